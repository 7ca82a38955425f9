"""Reading checkpoints: ours, every GPEN layout, and files that are neither."""

import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import save_file

import metagpen
from metagpen.errors import CheckpointError, ConfigError, DataError
from metagpen.gpen import GPEN
from metagpen.model import MetaGPEN
from metagpen.person import Person
from metagpen.weights import available, gpen_from_state, read_state
from metagpen.weights.files import infer_arguments

SHAPES = [(16, 2, 0.03125), (64, 1, 0.0625), (128, 2, 0.0625), (128, 1, 0.25)]


def test_a_model_goes_where_it_is_told():
    assert metagpen.load(device="auto").device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(DataError, match="device 'abacus' is not available here"):
        metagpen.load(device="abacus")


@pytest.mark.parametrize(("size", "multiplier", "narrow"), SHAPES)
def test_shape_is_read_off_the_tensors(size, multiplier, narrow):
    with torch.device("meta"):
        gpen = GPEN(size, multiplier, narrow)
    expected = {"size": size, "channel_multiplier": multiplier, "narrow": narrow, "style_dim": 512, "n_mlp": 8,
                "concat": True}
    assert infer_arguments(gpen.state_dict(), "x") == expected


@pytest.mark.parametrize(("size", "multiplier", "narrow"), [(256, 1, 0.5), (512, 2, 1.0)])
def test_published_shapes_are_recognised(size, multiplier, narrow):
    with torch.device("meta"):
        state = GPEN(size, multiplier, narrow).state_dict()
    arguments = infer_arguments(state, "x")
    assert (arguments["size"], arguments["channel_multiplier"], arguments["narrow"]) == (size, multiplier, narrow)


@pytest.mark.parametrize("wrap", [None, "g_ema", "g", "params_ema"])
def test_pth_plain_and_wrapped(tiny_model, tmp_path, wrap):
    state = tiny_model.gpen.state_dict()
    torch.save(state if wrap is None else {wrap: state, "iteration": 3}, tmp_path / "gpen.pth")
    images = torch.rand(1, 3, 16, 16)
    model = metagpen.load(tmp_path / "gpen.pth")
    assert model.start is None and torch.equal(model.restore(images), MetaGPEN(tiny_model.gpen).restore(images))


def test_averaged_weights_win_over_raw_ones(tiny_model, tmp_path):
    state = tiny_model.gpen.state_dict()
    torch.save({"g": {k: torch.zeros_like(v) for k, v in state.items()}, "g_ema": state}, tmp_path / "both.pth")
    assert torch.equal(read_state(tmp_path / "both.pth")["final_linear.0.weight"], state["final_linear.0.weight"])


def test_safetensors_of_a_plain_gpen(tiny_model, tmp_path):
    save_file({k: v.contiguous().clone() for k, v in tiny_model.gpen.state_dict().items()}, tmp_path / "g.safetensors")
    images = torch.rand(1, 3, 16, 16)
    restored = metagpen.load(tmp_path / "g.safetensors").restore(images)
    assert torch.equal(restored, MetaGPEN(tiny_model.gpen).restore(images))


def test_our_file_keeps_start_card_and_fingerprint(tiny_model, tmp_path):
    halved = MetaGPEN(tiny_model.gpen.half().float(), tiny_model.start.half().float(), tiny_model.card)
    model = metagpen.load(halved.save(tmp_path / "model.safetensors"))
    assert model.card == {"recogniser": "tests"} and model.fingerprint == halved.fingerprint
    assert not any(p.requires_grad for p in model.parameters()) and not model.training
    identity = torch.randn(2, 8)
    assert torch.equal(model.start(identity), halved.start(identity))


def test_other_weights_are_another_model(tiny_model):
    """A Person of the weights before must not pass for one of those that were loaded over them."""
    before = tiny_model.fingerprint
    state = {name: value + 1 for name, value in tiny_model.state_dict().items()}
    copy.deepcopy(tiny_model).load_state_dict(state)
    assert tiny_model.fingerprint == before
    tiny_model.load_state_dict(state)
    after = tiny_model.fingerprint
    assert after != before and pickle.loads(pickle.dumps(tiny_model)).fingerprint == after
    with torch.no_grad():
        tiny_model.gpen.final_linear[0].bias.add_(1)
    tiny_model.weights_changed()
    assert tiny_model.fingerprint not in (before, after)


@pytest.mark.parametrize("asked_before", [False, True])
def test_people_fit_a_model_whose_precision_was_changed(tiny_model, tmp_path, asked_before):
    """It stays the model that it was in full precision, whether anybody asked which one that is before or not."""
    person, full = Person.generic(tiny_model), copy.deepcopy(tiny_model)
    if asked_before:
        tiny_model.fingerprint  # noqa: B018
    tiny_model.bfloat16()
    file = person.save(tmp_path / "ada.safetensors")
    assert Person.load(file, full).model is full and Person.load(file, tiny_model).model is tiny_model
    assert tiny_model.dtype == torch.bfloat16
    tiny_model.float()
    assert tiny_model.fingerprint != full.fingerprint, "rounded weights, on which people may be learned"


def test_foreign_bytes_are_not_called_objects(tmp_path):
    (tmp_path / "photo.pth").write_bytes(b"\xff\xd8\xff\xe0 a picture" * 20)
    with pytest.raises(CheckpointError, match="damaged, or not a PyTorch checkpoint"):
        metagpen.load(tmp_path / "photo.pth")


def test_a_saved_model_is_rounded_and_never_to_infinity(tiny_model, tmp_path):
    file = tiny_model.save(tmp_path / "model.safetensors")
    saved = metagpen.load(file)
    assert saved.fingerprint != tiny_model.fingerprint
    assert metagpen.load(saved.save(tmp_path / "again.safetensors")).fingerprint == saved.fingerprint
    before = file.read_bytes()
    with torch.no_grad():
        tiny_model.gpen.final_linear[0].bias[0] = 1e5
    with pytest.raises(CheckpointError, match="model.safetensors: not written, because gpen.final_linear.0.bias"):
        tiny_model.save(file)
    assert file.read_bytes() == before
    assert metagpen.load(tiny_model.save(file, torch.float32)).gpen.final_linear[0].bias[0] == 1e5


def test_a_model_of_another_version_is_told_from_a_foreign_file(tiny_model, tmp_path):
    tensors = {name: value.contiguous().clone() for name, value in tiny_model.state_dict().items()}
    save_file(tensors, tmp_path / "newer.safetensors", {"format": "metagpen-model-5"})
    with pytest.raises(CheckpointError, match="newer.safetensors: a metagpen model of another version .*model-5"):
        metagpen.load(tmp_path / "newer.safetensors")
    save_file(tensors, tmp_path / "foreign.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="not a metagpen model"):
        MetaGPEN.from_file(tmp_path / "foreign.safetensors")
    with pytest.raises(CheckpointError, match="not a GPEN generator"):
        metagpen.load(tmp_path / "foreign.safetensors")


def test_missing_unexpected_and_misshapen_keys_are_named(tiny_model):
    state = dict(tiny_model.gpen.state_dict())
    state["extra.weight"] = state.pop("generator.conv1.noise.weight")
    with pytest.raises(CheckpointError, match=r"missing keys: generator\.conv1\.noise\.weight.*unexpected keys: extra"):
        gpen_from_state(state, "x.pth")
    state = dict(tiny_model.gpen.state_dict())
    state["generator.to_rgb1.bias"] = torch.zeros(1, 4, 1, 1)
    with pytest.raises(CheckpointError, match=r"other shapes: generator\.to_rgb1\.bias \(1, 4, 1, 1\)"):
        gpen_from_state(state, "x.pth")
    with pytest.raises(CheckpointError, match="not a GPEN generator"):
        gpen_from_state({"weight": torch.zeros(1)}, "x.pth")


class Trap:
    """Unpickling this would run code."""

    def __reduce__(self):
        return (print, ("executed",))


def test_bad_files(tmp_path, capsys):
    torch.save({"g": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(CheckpointError, match=r"trap\.pth: holds Python objects"):
        metagpen.load(tmp_path / "trap.pth")
    assert "executed" not in capsys.readouterr().out
    for name in ("text.pth", "text.safetensors"):
        (tmp_path / name).write_text("hello")
        with pytest.raises(CheckpointError, match=name):
            metagpen.load(tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="holds no state dict .*g_ema"):
        metagpen.load(tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="did you mean 'gpen-bfr-512'"):
        metagpen.load("gpen-bfr-521")


def test_catalogue_lists_the_embedded_model_first():
    rows = available()
    assert rows[0][0] == "embedded" and {"gpen-bfr-512", "gpen-bfr-256"} <= {row[0] for row in rows}


def test_changed_download_is_refused_and_offline_is_explained(tmp_path, monkeypatch):
    monkeypatch.setenv("METAGPEN_CACHE", str(tmp_path))
    from metagpen.weights import catalogue

    def no_network(*_):
        raise catalogue.urllib.error.URLError("no network")

    monkeypatch.setattr(catalogue, "download", no_network)
    with pytest.raises(CheckpointError, match="GPEN-BFR-256.pth"):
        catalogue.fetch("gpen-bfr-256")
    assert not list(tmp_path.iterdir())
    file = tmp_path / "GPEN-BFR-256.pth"
    file.write_bytes(b"one")
    assert catalogue.fetch("gpen-bfr-256") == file  # put there by hand: nothing to compare with
    (tmp_path / "GPEN-BFR-256.pth.sha256").write_text("0" * 64)
    with pytest.raises(CheckpointError, match="has changed"):
        catalogue.fetch("gpen-bfr-256")


def test_a_person_file_is_no_model(tiny_model, tmp_path):
    file = Person.generic(tiny_model).save(tmp_path / "ada.safetensors")
    with pytest.raises(CheckpointError, match="a Person file.*--person"):
        metagpen.load(file)
    with pytest.raises(CheckpointError, match="a folder, not a Person file.*--store"):
        Person.load(tmp_path, tiny_model)


def test_a_download_that_ends_early_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("METAGPEN_CACHE", str(tmp_path))
    from metagpen.weights import catalogue

    class Response(io.BytesIO):
        headers = {"Content-Length": "75500000"}

    size = 74_000_000  # near enough to what the catalogue says
    monkeypatch.setattr(catalogue.urllib.request, "urlopen", lambda *_, **__: Response(bytes(size)))
    with pytest.raises(CheckpointError, match="ended after 74000000 of 75500000 bytes"):
        catalogue.fetch("gpen-bfr-256")
    assert not list(tmp_path.iterdir())

    def broken(*_, **__):
        raise catalogue.http.client.IncompleteRead(b"")

    monkeypatch.setattr(catalogue.urllib.request, "urlopen", broken)
    with pytest.raises(CheckpointError, match="could not be downloaded"):
        catalogue.fetch("gpen-bfr-256")


def test_where_downloads_are_kept(monkeypatch):
    from metagpen.weights import catalogue

    monkeypatch.delenv("METAGPEN_CACHE", raising=False)
    monkeypatch.setenv("HOME", "/home/ada")
    for value, expected in (("", "/home/ada/.cache/metagpen"), ("/caches", "/caches/metagpen")):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert str(catalogue.cache_folder()) == expected


@pytest.mark.parametrize("size", [0, 4, 24, 96])
def test_sizes_that_no_gpen_has(size):
    with pytest.raises(ConfigError, match="power of two"):
        GPEN(size)
