"""Moved to ssl_locat/intervals/; here until every branch in work has followed."""

from ssl_locat.intervals.figures import LEVEL as LEVEL
from ssl_locat.intervals.figures import wilson as wilson
from ssl_locat.intervals.paired import RESAMPLES as RESAMPLES
from ssl_locat.intervals.paired import Difference as Difference
from ssl_locat.intervals.paired import Interval as Interval
from ssl_locat.intervals.paired import Tally as Tally
from ssl_locat.intervals.paired import Verdict as Verdict
from ssl_locat.intervals.paired import difference as difference
from ssl_locat.intervals.paired import interval as interval
