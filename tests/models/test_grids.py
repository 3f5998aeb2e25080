"""The grid that GAug's constants follow, when weights are opened: read off the tensors where it shows, asked for where it does not, never wrong."""

import logging
import math
import shutil

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ssl_locat.errors import CheckpointError
from ssl_locat.export.timm_folder import write_timm
from ssl_locat.models import features
from ssl_locat.models.backbone import create_backbone, init_weights, load_backbone
from ssl_locat.models.positions import resize_by_matrices, resize_positions, resize_table
from ssl_locat.models.weights import windows_of

VIT = {"embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 4}
SWIN = {"embed_dim": 8, "num_heads": (1, 2, 2), "depths": (1, 2, 1), "patch_size": 2}
ASKED = r"Give (the image size|it as in)"


def grids_of(model) -> list[tuple[int, int]]:
    return [module.initial_grid for name, module in model.named_modules() if name.endswith("attn.gaug")]


def grids_of_stages(model) -> list[tuple[int, int]]:
    return [stage.blocks[0].attn.gaug.initial_grid for stage in model.layers]


def export_of(model, folder):
    out = folder / "export"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    write_timm(model, out)
    return out


def is_square(n: int) -> bool:
    return n > 0 and math.isqrt(n) ** 2 == n


# --- ViTs: positions for any number of prefix tokens, on any grid


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    cols=st.integers(1, 9),
    registers=st.integers(0, 8),
    no_embed_class=st.booleans(),
    class_token=st.booleans(),
    positions=st.sampled_from([True, True, True, False]),
)
def test_a_grid_is_right_or_asked_for(tmp_path_factory, rows, cols, registers, no_embed_class, class_token, positions):
    """Whatever is opened without a question has the trained grid, unless its table is also that of a square grid in the usual convention,
    for which it is taken and said; with the trained image size it always opens, as it was."""
    special = registers + class_token
    options = {**VIT, "img_size": (4 * rows, 4 * cols), "reg_tokens": registers, "class_token": class_token}
    options |= {} if class_token else {"global_pool": "avg"}
    options |= {"no_embed_class": no_embed_class} if positions else {"pos_embed": "none"}
    torch.manual_seed(0)
    model = create_backbone("locatvit_tiny", **options).eval()
    path = tmp_path_factory.mktemp("grids") / "w.safetensors"
    save_file(model.state_dict(), path)
    tokens = rows * cols + (0 if no_embed_class else special)  # rows of the table
    try:
        opened = load_backbone(path)
    except CheckpointError as error:
        assert "Give " in str(error)
        assert not (positions and rows == cols and not special)  # nothing else than a square can it be
    else:
        usual = is_square(tokens - special)
        assert set(grids_of(opened)) == {(rows, cols)} or usual
        assert positions and opened.patch_embed.grid_size == opened.gaug_options["initial_grid"]
    told = f"{path}?img_size=[{4 * rows}, {4 * cols}]"
    again = load_backbone(told)
    assert set(grids_of(again)) == {(rows, cols)} and again.patch_embed.grid_size == (rows, cols)
    images = torch.randn(1, 3, 4 * rows, 4 * cols)
    with torch.no_grad():
        torch.testing.assert_close(features(again, images), features(model, images), atol=1e-5, rtol=0)


@settings(max_examples=40, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    other=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    registers=st.integers(0, 5),
    theirs=st.booleans(),
    ours=st.booleans(),
)
def test_a_run_starts_with_the_trained_grid_or_asks(tmp_path_factory, grid, other, registers, theirs, ours):
    """`backbone.init`: the model that takes the weights has another size and another convention about special tokens."""
    options = {**VIT, "reg_tokens": registers}
    source = create_backbone("locatvit_tiny", img_size=(4 * grid[0], 4 * grid[1]), no_embed_class=theirs, **options)
    torch.nn.init.normal_(source.pos_embed)
    path = tmp_path_factory.mktemp("init") / "w.safetensors"
    save_file(source.state_dict(), path)

    def target():
        return create_backbone("locatvit_tiny", img_size=(4 * other[0], 4 * other[1]), no_embed_class=ours, **options).eval()

    backbone = target()
    try:
        init_weights(backbone, str(path))
    except CheckpointError as error:
        assert "Give the image size" in str(error)
    else:
        usual = source.pos_embed.shape[1] - registers - 1  # patches, if every token has a position
        assert set(grids_of(backbone)) == {grid} or (is_square(usual) and set(grids_of(backbone)) == {(math.isqrt(usual),) * 2})
    backbone = target()
    init_weights(backbone, f"{path}?img_size=[{4 * grid[0]}, {4 * grid[1]}]&no_embed_class={str(theirs).lower()}")
    assert set(grids_of(backbone)) == {grid}
    skip = 0 if theirs else registers + 1
    expected = resize_table(source.pos_embed, skip, grid, other, "timm")[:, skip:]
    torch.testing.assert_close(backbone.pos_embed[:, 0 if ours else registers + 1 :], expected)


def test_weights_without_positions_are_asked_for_their_size_by_a_run(tmp_path):
    source = create_backbone("locatvit_tiny_rope_mixed", **{**VIT, "img_size": 24})
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    backbone = create_backbone("locatvit_tiny_rope_mixed", **{**VIT, "img_size": 16})
    with pytest.raises(CheckpointError, match=ASKED):
        init_weights(backbone, f"{tmp_path}/w.safetensors")
    for answer in ("img_size=24", "gaug={initial_grid: [6, 6]}"):
        init_weights(backbone, f"{tmp_path}/w.safetensors?{answer}")
        assert grids_of(backbone) == [(6, 6)]
        assert grids_of(load_backbone(f"{tmp_path}/w.safetensors?{answer}")) == [(6, 6)]


def test_the_users_grid_goes_before_that_of_the_positions(tmp_path):
    """Opened at another size and saved bare, positions are of that size, but GAug's constants of the first."""
    first = create_backbone("locatvit_tiny", **{**VIT, "img_size": 32, "gaug": {"initial_grid": (4, 4)}}).eval()
    save_file(first.state_dict(), tmp_path / "w.safetensors")
    again = load_backbone(f"{tmp_path}/w.safetensors?gaug={{initial_grid: [4, 4]}}")
    assert grids_of(again) == [(4, 4)] and again.patch_embed.grid_size == (8, 8)
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(features(again, images), features(first, images), atol=1e-5, rtol=0)


# --- exports, whose config says the grid


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("way", ["load_backbone", "timm"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("locatvit_tiny", {}),
        ("locatvit_tiny", {"pos_resize": "dino", "reg_tokens": 2}),
        ("locatvit_tiny", {"no_embed_class": True}),
        ("locat_vit_tiny_patch16_224", {}),
        ("locat_eva02_tiny_patch14_224", {}),
        ("locatjumbo_tiny", {}),
    ],
)
def test_an_export_opens_at_another_size_from_its_own_grid(tmp_path, way, name, options):
    """2 x 8 patches are as many as 4 x 4, and 3 x 5 are no square: timm takes every table to be of a square."""
    for trained, other in (((8, 32), (16, 16)), ((12, 20), (16, 24)), ((12, 20), (20, 12))):
        model = create_backbone(name, **VIT, **options, img_size=trained).eval()
        torch.nn.init.normal_(model.pos_embed)
        out = export_of(model, tmp_path)
        if way == "timm":
            again = timm.create_model(f"local-dir:{out}", pretrained=True, img_size=other)
        else:
            again = load_backbone(f"{out}?img_size={list(other)}")
            assert again.pretrained_cfg["input_size"] == (3, *other)
        grid, new = (tuple(side // 4 for side in size) for size in (trained, other))
        assert set(grids_of(again)) == {grid}
        skip = model.pos_embed.shape[1] - grid[0] * grid[1]
        torch.testing.assert_close(again.pos_embed, resize_table(model.pos_embed, skip, grid, new, model.pos_resize))
        assert torch.equal(load_backbone(out).pos_embed, model.pos_embed)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["locatswin_tiny", "locat_swin_tiny_patch4_window7_224"])
def test_an_exported_swin_keeps_its_windows(tmp_path, name):
    """Windows 2 x 5 of 27 relative positions, 1 x 5 of 9, which 2 x 2 have, too, and 1 x 3."""
    model = create_backbone(name, **SWIN, img_size=(4, 20), window_size=(2, 5)).eval()
    assert windows_of(model) == [(2, 5), (1, 5), (1, 3)]
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    out = export_of(model, tmp_path)
    images = torch.randn(1, 3, 4, 20)
    with torch.no_grad():
        torch.testing.assert_close(features(load_backbone(out), images), features(model, images))
        started = create_backbone(name, **SWIN, img_size=(4, 20), window_size=(2, 5)).eval()
        init_weights(started, str(out))
        torch.testing.assert_close(features(started, images), features(model, images))
    larger = load_backbone(f"{out}?img_size=[8, 40]")
    assert windows_of(larger) == [(2, 5), (2, 5), (1, 5)] and grids_of_stages(larger) == windows_of(model)


@pytest.mark.parametrize("how", ["dino", "transformers"])
def test_positions_of_an_exported_program_are_resized_alike(how):
    torch.manual_seed(0)
    table = torch.randn(1, 35, 6)
    for new in ((5, 7), (5, 9), (9, 14), (2, 3), (1, 20), (37, 7)):
        given = resize_by_matrices(table, (5, 7), new, how)
        torch.testing.assert_close(given, resize_positions(table, (5, 7), new, how), atol=1e-5, rtol=1e-5)
    assert torch.equal(resize_by_matrices(table, (5, 7), (5, 7), how), table)


# --- positions of class token and registers


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("theirs", [True, False])
@pytest.mark.parametrize("locat", [True, False])
def test_conventions_about_special_tokens_convert_exactly(tmp_path, registers, theirs, locat):
    """A position is a constant added to its token, so `no_embed_class` weights fit a model with positions for every token, and back."""
    name = "locatvit_tiny" if locat else "vit_tiny"
    options = {**VIT, "img_size": (12, 20), "reg_tokens": registers}  # 15 patches
    torch.manual_seed(0)
    source = create_backbone(name, no_embed_class=theirs, **options).eval()
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    target = create_backbone(name, no_embed_class=not theirs, **options).eval()
    init_weights(target, f"{tmp_path}/w.safetensors?img_size=[12, 20]&no_embed_class={str(theirs).lower()}")
    opened = load_backbone(f"{tmp_path}/w.safetensors?img_size=[12, 20]&no_embed_class={str(not theirs).lower()}&num_heads=2")
    assert opened.no_embed_class != theirs
    for size in ((12, 20), (24, 16)):
        images = torch.randn(2, 3, *size)
        with torch.no_grad():
            expected = features(source, images)
            torch.testing.assert_close(features(target, images), expected, atol=1e-5, rtol=0)
            torch.testing.assert_close(features(opened, images), expected, atol=1e-5, rtol=0)


# --- Swins: each stage's window


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 20),
    cols=st.integers(1, 20),
    window=st.one_of(st.integers(1, 6), st.tuples(st.integers(1, 6), st.integers(1, 6))),
)
def test_windows_are_right_or_asked_for(tmp_path_factory, rows, cols, window):
    torch.manual_seed(0)
    size = (2 * rows, 2 * cols)
    model = create_backbone("locatswin_tiny", img_size=size, window_size=window, **SWIN).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("table"):
            torch.nn.init.normal_(parameter)
    path = tmp_path_factory.mktemp("windows") / "w.safetensors"
    save_file(model.state_dict(), path)
    lengths = [block.attn.relative_position_bias_table.shape[0] for block in (layer.blocks[0] for layer in model.layers)]
    try:
        opened = load_backbone(path)
    except CheckpointError as error:
        assert "Give the image size" in str(error)
        assert any(rows != cols for rows, cols in grids_of(model))
    else:
        assert grids_of(opened) == grids_of(model) or all(is_square(length) for length in lengths)
        assert windows_of(opened) == grids_of_stages(opened)
    again = load_backbone(
        f"{path}?img_size=[{size[0]}, {size[1]}]&window_size={list(window) if isinstance(window, tuple) else window}"
    )
    assert grids_of(again) == grids_of(model)
    images = torch.randn(1, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(features(again, images), features(model, images), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["locatswin_small_stage", "locatswin_small_stage_patch2_dynamic", "locatswin_static"])
def test_bare_swin_weights_are_what_they_were(golden, tmp_path, caplog, name):
    """The reference's networks, stages smaller than the window among them: without a word about sizes, and its outputs."""
    file = golden(name)
    save_file(file.state(), tmp_path / "w.safetensors")
    caplog.set_level(logging.INFO)
    model = load_backbone(f"{tmp_path}/w.safetensors")
    side = file.config["kw"]["img_size"]
    assert f"({side}x{side} px; assumed: images of {side}x{side} px, say img_size=PIXELS otherwise)" in caplog.text
    assert grids_of_stages(model) == windows_of(model)
    with torch.no_grad():
        torch.testing.assert_close(model(file["in.0.x"]), file["out.0.logits"], rtol=1e-5, atol=2e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")  # from the way in which timm resizes the table of positions
def test_bare_swin_weights_at_another_size_keep_what_was_trained(golden, tmp_path):
    file, path = golden("locatswin_small_stage"), tmp_path / "w.safetensors"  # windows 7, 7 and, on a map of 4 x 4, 4
    state = file.state()
    save_file(state, path)
    for size in (64, 96, 224):
        model = load_backbone(f"{path}?img_size={size}")
        assert grids_of_stages(model) == windows_of(model) == [(7, 7), (7, 7), (4, 4)]
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    smaller = load_backbone(f"{path}?img_size=32")
    assert windows_of(smaller) == [(7, 7), (4, 4), (2, 2)] and grids_of_stages(smaller) == [(7, 7), (7, 7), (4, 4)]
    options = {key: value for key, value in file.config["kw"].items() if key != "img_size"}
    larger = create_backbone("locatswin_tiny", img_size=128, **options).eval()  # a run's own, whose last window is 7, too
    init_weights(larger, str(path))
    assert windows_of(larger) == [(7, 7)] * 3 and grids_of_stages(larger) == [(7, 7), (7, 7), (4, 4)]
    again = create_backbone("locatswin_tiny", img_size=64, **options).eval()
    init_weights(again, str(path))
    with torch.no_grad():
        torch.testing.assert_close(again(file["in.0.x"]), file["out.0.logits"], rtol=1e-5, atol=2e-5)


def test_a_vanilla_swin_opens_by_its_name(tmp_path):
    options = {"embed_dim": 8, "depths": (1, 2), "num_heads": (1, 2), "img_size": 32}
    torch.manual_seed(0)
    model = create_backbone("swin_tiny_patch4_window7_224", **options).eval()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="name the timm model"):
        load_backbone(tmp_path / "w.safetensors")
    spec = "&".join(f"{key}={list(value) if isinstance(value, tuple) else value}" for key, value in options.items())
    again = load_backbone(f"{tmp_path}/w.safetensors?name=swin_tiny_patch4_window7_224&{spec}")
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(features(again, images), features(model, images), atol=1e-6, rtol=0)


# --- Jumbo


@pytest.mark.parametrize("options", [{}, {"jumbo_mlp_ratio": 1}, {"jumbo_mlp_ratio": 2.5, "mlp_ratio": 2}, {"mlp_ratio": 3}, {"init_values": None}, {"norm_patches": False}])  # fmt: skip
def test_a_bare_jumbo_shows_its_options(tmp_path, options):
    torch.manual_seed(0)
    model = create_backbone("locatjumbo_tiny", **{**VIT, "img_size": 16, "num_class_tokens": 3, **options}).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    again = load_backbone(f"{tmp_path}/w.safetensors")
    images = torch.randn(1, 3, 16, 24)
    with torch.no_grad():
        torch.testing.assert_close(features(again, images), features(model, images), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["jumbo", "locatjumbo", "jumbo_mlp2", "locatjumbo_mlp1"])
def test_the_references_jumbo_opens_bare(golden, tmp_path, name):
    file = golden(name)
    save_file(file.state(), tmp_path / "w.safetensors")
    heads = "" if name.startswith("locat") else f"?num_heads={file.config['kw']['num_heads']}"  # vanilla tensors do not show them
    model = load_backbone(f"{tmp_path}/w.safetensors{heads}")
    with torch.no_grad():
        torch.testing.assert_close(model(file["in.0.x"]), file["out.0.logits"], rtol=1e-5, atol=2e-5)
