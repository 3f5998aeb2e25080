import numpy as np

from ssl_locat import cli
from ssl_locat.evaluation import compare
from ssl_locat.evaluation.compare_text import draw
from ssl_locat.intervals.paired import Tally
from ssl_locat.text.shown import to_json

HOSTILE = "runs/<script>alert(1)</script>"


def test_the_results_of_a_comparison_become_one_page(tmp_path, capsys):
    rng = np.random.default_rng(0)
    rows = {
        name: {column: Tally.of_hits(rng.random(200) < share) for column in ("knn 100 %", "linear 100 %")}
        for name, share in (("raw pixels", 0.3), ("untrained", 0.4), ("start", 0.5), (HOSTILE, 0.8))
    }
    _, config = compare.load_compare(["start", "data.train=a", "data.test=b", "fractions=[1.0]"])
    result = compare.judged(["start", HOSTILE], rows, config, {"train": {"images": 0, "of": 900, "pairs": []}})
    (tmp_path / "compare.json").write_text(to_json(result))
    draw(result, tmp_path / "compare.png")
    assert cli.run_command(["report", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "helped, +" in page and "No test image was found among the 900" in page and "data:image/webp;base64," in page
    assert page.index("No test image was found") < page.index("helped, +") < page.index("Figures")  # leaks before any number
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page

    (tmp_path / "compare.json").write_text('{"rows": 3}')
    assert cli.run_command(["report", str(tmp_path)]) == 2
    assert "is not what `ssl-locat compare` writes" in capsys.readouterr().err
