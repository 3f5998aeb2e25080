"""Label-free measures against the numbers of their reference implementations (../shared/golden2)."""

import pytest
import torch
import torch.nn.functional as F
from conftest import SHARED, Golden

from ssl_locat.label_free.alpha_req import alpha_req, eigenspectrum
from ssl_locat.label_free.dse import (
    DSE,
    balanced_dse,
    combine,
    dse,
    effective_dimension,
    kmeans,
    local_maxima,
    mean_distance,
    nearest_other,
    radii,
)
from ssl_locat.label_free.lidar import lidar
from ssl_locat.label_free.norm_outliers import norm_outlier_share
from ssl_locat.label_free.rankme import rankme
from ssl_locat.label_free.uniformity import alignment, uniformity

MATRICES = ("views", "isotropic", "powerlaw", "collapsed")


@pytest.fixture(scope="module")
def golden2():
    def load(name: str) -> Golden:
        path = SHARED / "golden2" / f"{name}.safetensors"
        if not path.exists():
            pytest.skip(f"no golden vectors: {path} is not there (they lie beside the checkout, not in it)")
        return Golden(path)

    return load


@pytest.mark.parametrize("name", ["dse_published", "dse_unconverged"])
def test_every_part_of_dse_equals_the_reference(golden2, name):
    """From the reference's first centroids and permutation: k-means itself, radii, distances, dimensionality and the sum."""
    case = golden2(name)
    for checkpoint in range(case.config["checkpoints"]):
        at = f"out.{checkpoint}."
        patches = F.normalize(case[f"in.{checkpoint}.features"], dim=-1)
        average = mean_distance(patches)
        assert float(average) == pytest.approx(float(case[at + "avg_l2"]), rel=1e-5)
        local = kmeans(patches, case[at + "local_init"])
        assert (local.labels == case[at + "local_labels"]).all()
        assert torch.allclose(local.centroids, case[at + "local_centroids"], atol=1e-5)
        local_radii = torch.stack([radii(*pair, case.config["local"]) for pair in zip(patches, local.labels, strict=True)])
        assert torch.allclose(local_radii, case[at + "local_radius"], rtol=1e-5, equal_nan=True)
        intra_1 = local_radii.nanmean(1).mean() / average
        inter, spread = [], []
        for number, group in enumerate(patches.split(case.config["inter_images"])):
            points = group.flatten(0, 1)
            found = kmeans(points.unsqueeze(0), case[at + f"group{number}.init"].unsqueeze(0))
            assert (found.labels[0] == case[at + f"group{number}.labels"]).all()
            spread.append(radii(points, found.labels[0], case.config["global"]))
            assert torch.allclose(spread[-1], case[at + f"group{number}.radius"], rtol=1e-5, equal_nan=True)
            inter.append(nearest_other(points, found.labels[0], found.centroids[0]))
        permuted = patches.gather(1, case[at + "perm"].unsqueeze(-1).expand_as(patches))
        ranks = effective_dimension(permuted)
        assert torch.allclose(ranks.float(), case[at + "effective_rank"], rtol=1e-5)
        parts = {
            "inter": torch.stack(inter).mean() / average,
            "intra_image": intra_1,
            "intra_batch": torch.cat(spread).nanmean() / average,
            "dim": ranks.mean(),
        }
        for part, value in parts.items():
            assert float(value) == pytest.approx(float(case[at + part]), rel=1e-5), part
        total = combine(*(float(parts[part]) for part in ("inter", "intra_image", "intra_batch", "dim")))
        assert total == pytest.approx(float(case[at + "dse"]), rel=1e-5)


def test_own_kmeans_gives_the_reference_dse_within_seed_noise(golden2):
    """The reference's own spread over seeds on these features is 0.008 to 0.044."""
    case = golden2("dse_published")
    for checkpoint in range(case.config["checkpoints"]):
        assert dse(case[f"in.{checkpoint}.features"]).dse == pytest.approx(float(case[f"out.{checkpoint}.dse"]), abs=0.15)


def test_choice_of_checkpoints_equals_the_reference(golden2):
    case = golden2("dse_published")
    scores = case["in.P"].tolist()
    for top in (1, 3):
        assert local_maxima(scores, top=top) == case[f"out.select_top{top}"].tolist()
    plateau = [1, 2, 2, 1, 0, 3, 3, 3, 0, 5]
    assert local_maxima(plateau) == case["out.select_top3_plateau"].tolist()


@pytest.mark.parametrize("matrix", MATRICES)
def test_rank_measures_equal_the_reference(golden2, matrix):
    case = golden2("rank_metrics")
    features, at = case[f"in.{matrix}"], f"out.{matrix}."
    assert float(rankme(features, epsilon=1e-5)) == pytest.approx(float(case[at + "rankme"]), rel=1e-4)
    assert torch.allclose(eigenspectrum(features), case[at + "eigenspectrum"], atol=1e-12)
    rank = effective_dimension(features.unsqueeze(1))
    assert float(rank) == pytest.approx(float(case[at + "dse_effective_rank"]), rel=1e-4)
    for first, last in case.config["tranges"]:
        found, name = alpha_req(features, first + 1, last), f"{at}alpha_{first}_{last}"  # theirs count from 0, up to `last`
        assert found.alpha == pytest.approx(float(case[name]), rel=1e-6)
    for views in case.config["lidar_q"]:
        images = min(case.config["lidar_classes"], len(features) // views)
        # float64: of `collapsed` the reference's own float32 value is 20 % off
        expected = float(case[f"{at}lidar_q{views}.lidar_fp64"])
        assert float(lidar(features[: images * views], views)) == pytest.approx(expected, rel=1e-4)


def test_alignment_and_uniformity_equal_the_reference(golden2):
    case = golden2("rank_metrics")
    x, y = case["in.align_x"], case["in.align_y"]
    for alpha in (1, 2):
        assert float(alignment(x, y, alpha)) == pytest.approx(float(case[f"out.align_alpha{alpha}"]), rel=1e-6)
    for name, points in {"x": x, "y": y}.items():
        for t in (2, 3):
            assert float(uniformity(points, t)) == pytest.approx(float(case[f"out.uniform_{name}_t{t}"]), rel=1e-6)
    both = alignment(x, y) + (uniformity(x) + uniformity(y)) / 2
    assert float(both) == pytest.approx(float(case["out.align_plus_uniform"]), rel=1e-6)


def test_dse_is_repeatable_and_takes_any_number_of_images():
    features = torch.randn(11, 16, 12, generator=torch.Generator().manual_seed(0))  # a last group of three
    assert dse(features) == dse(features)
    alike = dse(torch.ones(4, 16, 12))  # a collapsed network: no distance is defined, and nothing raises
    assert alike.dim == pytest.approx(1 / 4)


def test_the_papers_lambda_brings_both_terms_to_one_scale():
    """Dimensionality that varies a hundredth as much as separation must still be heard."""
    parts = [DSE(0.0, inter, 0.2, 0.2, dim) for inter, dim in ((1.0, 0.50), (2.0, 0.53), (3.0, 0.51), (2.5, 0.52))]
    separation = torch.tensor([1.0, 2.0, 3.0, 2.5]).std()
    balanced = torch.tensor(balanced_dse(parts))
    unweighted = torch.tensor([combine(p.inter, p.intra_1, p.intra_8, 0.0) for p in parts])
    assert (balanced - unweighted).std() == pytest.approx(float(separation), rel=1e-5)
    assert balanced_dse(parts[:1]) == [pytest.approx(combine(1.0, 0.2, 0.2, 0.5))]


def test_outlying_norms_are_counted():
    patches = torch.nn.functional.normalize(torch.randn(4, 25, 8), dim=-1)
    patches[0, :3] *= 10
    assert float(norm_outlier_share(patches)) == pytest.approx(3 / 100)
    assert float(norm_outlier_share(5 * patches)) == pytest.approx(3 / 100)  # a scale means nothing


def test_lidar_without_views_is_refused():
    with pytest.raises(ValueError, match="at least 2 views"):
        lidar(torch.randn(8, 4), 1)
