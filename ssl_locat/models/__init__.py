"""Backbones: timm's models with LocAt (GAug, PRR) attached, the attention kernels behind one function, tokens as everything
above reads them, weights in and out.

Imported by objectives, evaluation, export, pretraining, report. Begin with attach.py, then gaug.py; `create_backbone` and
`load_backbone` are in backbone.py.
"""

from ssl_locat.models import registry as registry
from ssl_locat.models.attach import attach_locat as attach_locat
from ssl_locat.models.tokens import (
    Tokens as Tokens,
)
from ssl_locat.models.tokens import (
    class_token as class_token,
)
from ssl_locat.models.tokens import (
    features as features,
)
from ssl_locat.models.tokens import (
    forward_tokens as forward_tokens,
)
from ssl_locat.models.tokens import (
    last_blocks as last_blocks,
)
from ssl_locat.models.tokens import (
    refine as refine,
)
