"""Recognisers: alignment, loaders, gradients, and agreement with the references."""

from __future__ import annotations

import csv
import hashlib
import json
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn

from metagpen.errors import CheckpointError, ConfigError, DataError
from metagpen.evaluate import judges
from metagpen.faces.align import FFHQ_LANDMARKS
from metagpen.recognise import InputSpec, Recogniser, load, verification
from metagpen.recognise.align import ARCFACE, arcface, similarity, warp
from metagpen.recognise.iresnet import DEPTHS, IResNet
from metagpen.recognise.mobilefacenet import MobileFaceNet
from metagpen.recognise.onnx import first_operations
from metagpen.recognise.student import StudentNet, fuse
from metagpen.recognise.verify import accuracy, best_threshold, pairs
from metagpen.tensors import digest_of


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@torch.no_grad()
def shake(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random values everywhere, batch statistics included, so that a lost tensor shows."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            fan = max(1, tensor[0].numel()) if tensor.ndim else 1
            value = torch.randn(tensor.shape, generator=generator) / math.sqrt(fan)
            tensor.copy_(value.abs() + 0.5 if "var" in name else value)
    return module.eval()


# ------------------------------------------------------------------------------------------------- alignment


def test_similarity_recovers_a_known_transform():
    points = torch.tensor(ARCFACE)[None]
    angle, scale, shift = 0.4, 1.7, torch.tensor([5.0, -3.0])
    turn = scale * torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    matrix = similarity(points, points @ turn.T + shift)[0]
    torch.testing.assert_close(matrix, torch.cat([turn, shift[:, None]], 1), atol=1e-4, rtol=1e-5)


def test_similarity_is_the_best_one():
    source = noise(1, 5, 2).double() * 50
    target = noise(1, 5, 2, seed=1).double() * 50

    def error(matrix: torch.Tensor) -> float:
        return float((source[0] @ matrix[:, :2].T + matrix[:, 2] - target[0]).square().sum())

    best = similarity(source, target)[0]
    for column, change in [(0, [[1, 0], [0, 1]]), (0, [[0, -1], [1, 0]]), (2, [1, 0]), (2, [0, 1])]:
        for step in (1e-2, -1e-2):
            other = best.clone()
            if column == 0:
                other[:, :2] += step * torch.tensor(change)
            else:
                other[:, 2] += step * torch.tensor(change)
            assert error(other) > error(best)


@pytest.mark.parametrize("side", [96, 128, 333])
def test_warp_brings_landmarks_to_the_template(side):
    """A ramp picture tells where each output pixel came from."""
    template = torch.tensor(ARCFACE)
    landmarks = torch.tensor(FFHQ_LANDMARKS, dtype=torch.float32)[None] * side
    ramp = torch.arange(side) + 0.5  # pixel centres
    image = torch.stack([ramp[None].expand(side, side), ramp[:, None].expand(side, side), torch.zeros(side, side)])
    out = warp(image[None], landmarks, template, (112, 112))[0, :2].permute(1, 2, 0)
    centres = torch.tensor([[30, 50], [60, 70], [80, 90]])  # (x, y) pixels of the output
    matrix = similarity(template[None], landmarks)[0]
    expected = (centres + 0.5) @ matrix[:, :2].T + matrix[:, 2]
    torch.testing.assert_close(out[centres[:, 1], centres[:, 0]], expected, atol=0.05, rtol=0)


def test_a_view_kept_for_several_pictures_shows_what_landmarks_show(tiny_recogniser):
    crops = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    landmarks = torch.tensor(FFHQ_LANDMARKS, dtype=torch.float32) * 64 + torch.randn(2, 5, 2)
    kept = tiny_recogniser.view(landmarks, crops)
    assert torch.equal(tiny_recogniser.embed(crops, kept), tiny_recogniser.embed(crops, landmarks))
    assert torch.equal(tiny_recogniser.align(crops.flip(0), kept), tiny_recogniser.align(crops.flip(0), landmarks))


def test_warp_does_not_alias():
    """Stripes of one pixel average to grey when reduced eightfold, instead of turning into coarse stripes."""
    side = 896
    stripes = (torch.arange(side) % 2 * 2.0 - 1).expand(1, 3, side, side)
    landmarks = torch.tensor(ARCFACE)[None] * 8
    assert warp(stripes, landmarks, torch.tensor(ARCFACE), (112, 112)).abs().max() < 0.05


def test_arcface_template_of_both_shapes():
    assert arcface((112, 112)) == ARCFACE
    assert np.allclose(arcface((112, 96)), np.array(ARCFACE) - [8, 0])


# ------------------------------------------------------------------------------------------------ recogniser


@pytest.fixture(scope="module")
def embedded() -> Recogniser:
    return load("embedded")


def test_embedded_yields_unit_embeddings(embedded):
    out = embedded.embed(noise(2, 3, 128, 128))
    assert out.shape == (2, embedded.dim) == (2, 256)
    torch.testing.assert_close(out.norm(dim=1), torch.ones(2))
    assert sum(p.numel() for p in embedded.parameters()) < 1.2e6
    assert not any(p.requires_grad for p in embedded.parameters())


def test_gradients_reach_the_images_only(embedded):
    images = noise(2, 3, 96, 96).requires_grad_()
    maps, embedding = embedded.perceive(images)
    (1 - embedding[:, 0].mean() + sum(m.square().mean() for m in maps)).backward()
    assert images.grad.abs().sum() > 0
    assert all(p.grad is None for p in embedded.parameters())
    assert [m.shape[-1] for m in maps] == sorted([m.shape[-1] for m in maps], reverse=True)


def test_gradient_is_the_derivative(embedded):
    """Along a random direction, against a central difference in float64."""
    net = load("embedded").net.double()
    x, direction = noise(1, 3, 128, 128).double(), noise(1, 3, 128, 128, seed=1).double()
    x.requires_grad_()
    net(x)[0, :8].sum().backward()
    step = 1e-8  # small: a kink of a leaky ReLU in between would count as an error
    with torch.no_grad():
        slope = (net(x + step * direction) - net(x - step * direction))[0, :8].sum() / (2 * step)
    torch.testing.assert_close((x.grad * direction).sum(), slope, rtol=1e-3, atol=1e-6)


def test_frozen_even_inside_a_training_module(embedded):
    images = noise(2, 3, 128, 128)
    before = embedded.embed(images)
    parent = nn.ModuleList([embedded]).train()
    assert not any(module.training for module in embedded.modules())
    parent.eval()
    torch.testing.assert_close(embedded.embed(images), before, rtol=0, atol=0)


def test_bfloat16_stays_close():
    images = noise(4, 3, 128, 128)
    exact = load("embedded").embed(images)
    rounded = load("embedded").to(torch.bfloat16).embed(images)
    assert rounded.dtype == torch.float32
    assert (exact * rounded).sum(1).min() > 0.99


def test_landmarks_and_wrong_shapes(embedded):
    images = noise(1, 3, 128, 128)
    mean = torch.tensor(FFHQ_LANDMARKS, dtype=torch.float32)[None] * 128
    torch.testing.assert_close(embedded.embed(images, mean), embedded.embed(images))
    assert (embedded.embed(images, mean + 6) * embedded.embed(images)).sum() < 0.999
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\]"):
        embedded.embed(images[0])


def test_fusing_batch_norm_changes_nothing():
    net = shake(StudentNet(32, 16, (8, 12, 16), (1, 1, 1), top=24))
    images = noise(2, 3, 32, 32)
    before = net(images)
    torch.testing.assert_close(fuse(net)(images), before, rtol=1e-3, atol=1e-4)


# --------------------------------------------------------------------------------------------------- loaders


@pytest.mark.parametrize("name, millions", [("iresnet18", 24.03), ("iresnet34", 34.14), ("iresnet50", 43.59),
                                            ("iresnet100", 65.16)])
def test_iresnet_parameter_counts(name, millions):
    with torch.device("meta"):
        net = IResNet(DEPTHS[name])
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 2) == millions
    assert net.plan == name


@pytest.mark.parametrize("suffix, wrap", [(".pth", lambda s: s), (".pt", lambda s: {"state_dict": s}),
                                          (".safetensors", None)])
def test_iresnet_round_trip(tmp_path, suffix, wrap):
    net = shake(IResNet((2, 1, 3, 1), (8, 12, 16, 20), dim=32))
    state = {name.replace("features_norm.", "features."): value for name, value in net.state_dict().items()}
    path = tmp_path / f"face{suffix}"
    if wrap is None:
        from safetensors.torch import save_file

        save_file({name: value.contiguous() for name, value in state.items()}, path)
    else:
        torch.save(wrap({f"module.{name}": value for name, value in state.items()}), path)
    read = load(path)
    assert read.dim == 32 and read.spec.size == (112, 112) and read.name == "face"
    images = noise(2, 3, 112, 112)
    torch.testing.assert_close(read.net(images), net(images))
    assert len(read.features(images)) == 4


def tiny_mobilefacenet() -> dict[str, torch.Tensor]:
    """A state dict of the usual layout with few channels, input 112 x 96."""
    generator = torch.Generator().manual_seed(0)
    state = {}

    def convolution(name: str, *shape: int) -> None:
        state[name] = torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"] = torch.rand(width, generator=generator) + 0.5
        state[f"{name}.bias"] = torch.randn(width, generator=generator)
        state[f"{name}.running_mean"] = torch.randn(width, generator=generator)
        state[f"{name}.running_var"] = torch.rand(width, generator=generator) + 0.5
        state[f"{name}.num_batches_tracked"] = torch.tensor(0)

    def block(name: str, *shape: int, linear: bool = False) -> None:
        convolution(f"{name}.conv.weight", *shape)
        norm(f"{name}.bn", shape[0])
        if not linear:
            state[f"{name}.prelu.weight"] = torch.rand(shape[0], generator=generator)

    block("conv1", 8, 3, 3, 3)
    block("dw_conv1", 8, 1, 3, 3)
    for index, (inputs, width, outputs) in enumerate([(8, 16, 8), (8, 32, 16), (16, 32, 16), (16, 64, 16)]):
        name = f"blocks.{index}.conv"
        convolution(f"{name}.0.weight", width, inputs, 1, 1)
        convolution(f"{name}.3.weight", width, 1, 3, 3)
        convolution(f"{name}.6.weight", outputs, width, 1, 1)
        norm(f"{name}.1", width), norm(f"{name}.4", width), norm(f"{name}.7", outputs)
        state[f"{name}.2.weight"] = torch.rand(width, generator=generator)
        state[f"{name}.5.weight"] = torch.rand(width, generator=generator)
    block("conv2", 32, 16, 1, 1)
    block("linear7", 32, 1, 7, 6, linear=True)
    block("linear1", 24, 32, 1, 1, linear=True)
    return state


def test_mobilefacenet_is_built_from_its_tensors(tmp_path):
    torch.save({"epoch": 1, "net_state_dict": tiny_mobilefacenet()}, tmp_path / "mobile.ckpt")
    recogniser = load(tmp_path / "mobile.ckpt")
    assert recogniser.dim == 24 and recogniser.spec.size == (112, 96)
    assert [m.shape[-1] for m in recogniser.features(noise(1, 3, 128, 128))] == [48, 24, 12, 6]
    assert isinstance(recogniser.net, MobileFaceNet)


@pytest.mark.parametrize("name, content, message", [
    ("a.pth", {"encoder.weight": torch.zeros(2)}, "none of the known recognisers.*encoder.weight"),
    ("a.pth", {"epoch": 3}, "holds no state dict"),
    ("a.pth", b"this is no checkpoint", "damaged, or not a PyTorch checkpoint"),
    ("a.onnx", b"nor is this", "onnxruntime cannot open it"),
    ("a.xml", b"<html></html>", "not an OpenVINO IR"),
    ("a.xml", b"<net", "not readable as XML"),
    ("a.safetensors", b"too short", "not a readable safetensors"),
    ("a.txt", b"text", "cannot tell a recogniser"),
])
def test_unusable_files_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=message) as error:
        load(path)
    assert str(path) in str(error.value)


def test_missing_file_and_damaged_network(tmp_path):
    with pytest.raises(CheckpointError, match="no such recogniser file"):
        load(tmp_path / "absent.pth")
    state = tiny_mobilefacenet()
    del state["blocks.2.conv.4.bias"]
    torch.save(state, tmp_path / "torn.pth")
    with pytest.raises(CheckpointError, match="blocks.2.conv.4.bias"):
        load(tmp_path / "torn.pth")


# ------------------------------------------------------------------------------------------- IR, small and real

def write_ir(folder, act: str = "ReLU") -> tuple[np.ndarray, np.ndarray]:
    """A convolution, a bias and an activation as an IR pair; returns weight and bias."""
    random = np.random.default_rng(0)
    weight = random.standard_normal((4, 3, 3, 3)).astype(np.float32)
    bias = random.standard_normal((1, 4, 1, 1)).astype(np.float32)
    padded = 'strides="2, 2" dilations="1, 1" pads_begin="1, 1" pads_end="1, 1" auto_pad="explicit"'
    layers = [("in", "Parameter", "", (1, 3, 16, 16)),
              ("w", "Const", 'element_type="f32" shape="4, 3, 3, 3" offset="0" size="432"', weight.shape),
              ("b", "Const", 'element_type="f32" shape="1, 4, 1, 1" offset="432" size="16"', bias.shape),
              ("conv", "Convolution", padded, (1, 4, 8, 8)), ("add", "Add", "", (1, 4, 8, 8)),
              ("act", act, "", (1, 4, 8, 8)), ("out", "Result", "", ())]
    edges = [("in", "conv", 0), ("w", "conv", 1), ("conv", "add", 0), ("b", "add", 1), ("add", "act", 0),
             ("act", "out", 0)]
    text = "".join(f'<layer id="{name}" name="{name}" type="{kind}"><data {data}/><output><port id="9">'
                   + "".join(f"<dim>{size}</dim>" for size in shape) + "</port></output></layer>"
                   for name, kind, data, shape in layers)
    links = "".join(f'<edge from-layer="{a}" from-port="9" to-layer="{b}" to-port="{port}"/>' for a, b, port in edges)
    (folder / "tiny.xml").write_text(f"<net><layers>{text}</layers><edges>{links}</edges></net>")
    (folder / "tiny.bin").write_bytes(weight.tobytes() + bias.tobytes())
    return weight, bias


def test_ir_graph_against_plain_torch(tmp_path):
    weight, bias = write_ir(tmp_path)
    x = noise(2, 3, 16, 16)
    plain = torch.conv2d(x, torch.from_numpy(weight), torch.from_numpy(bias).flatten(), 2, 1).relu()
    torch.testing.assert_close(load(tmp_path / "tiny.xml").net(x), plain)


def test_ir_errors(tmp_path):
    write_ir(tmp_path, act="Gelu")
    with pytest.raises(CheckpointError, match="operation Gelu"):
        load(tmp_path / "tiny.xml")
    write_ir(tmp_path)
    (tmp_path / "tiny.bin").write_bytes(b"\0" * 100)
    with pytest.raises(CheckpointError, match="cut short"):
        load(tmp_path / "tiny.xml")
    (tmp_path / "tiny.bin").unlink()
    with pytest.raises(CheckpointError, match="tiny.bin.*missing"):
        load(tmp_path / "tiny.xml")


RETAIL = "weights/face-reidentification-retail-0095.fp16.xml"
MOBILE = "weights/mobilefacenet_casia_xiaoccer_068.ckpt"


def test_retail_0095_agrees_with_openvino(shared):
    openvino = pytest.importorskip("openvino")
    recogniser = load(shared / RETAIL)
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    reference = openvino.Core().compile_model(str(shared / RETAIL), "CPU", settings)
    pixels = (recogniser.align(some_faces(shared, people=1, photos=2)[0]) * 127.5 + 127.5).flip(1)
    theirs = torch.from_numpy(np.concatenate([reference(p[None].numpy())[0].reshape(1, -1) for p in pixels]))
    assert torch.cosine_similarity(recogniser.net(pixels).flatten(1), theirs).min() > 0.999


def test_detour_around_strided_depthwise_is_exact(shared):
    """With gradients the strided depthwise convolutions are computed differently; the values must agree."""
    recogniser = load(shared / RETAIL)
    images = noise(2, 3, 128, 128)
    with torch.no_grad():
        straight = recogniser.embed(images)
    torch.testing.assert_close(recogniser.embed(images.requires_grad_()).detach(), straight, rtol=1e-4, atol=1e-5)


def some_faces(shared, people: int, photos: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Crops [N, 3, 256, 256], landmarks, and a number for each person, from the validation people."""
    with (shared / "photos/splits.csv").open() as file:
        names = sorted(row["id"] for row in csv.DictReader(file)
                       if row["set"] == "celeba_wild_256" and row["split"] == "val")[:people]
    folder = shared / "photos/celeba_wild_256"
    with (folder / "manifest.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if float(row["src_crop_side_px"]) >= 192]
    chosen = [row for name in names for row in [r for r in rows if r["id"] == name][:photos]]
    crops = [torch.from_numpy(np.array(Image.open(folder / row["file"]).convert("RGB"))) for row in chosen]
    marks = [[[float(row[f"x{i}"]), float(row[f"y{i}"])] for i in range(5)] for row in chosen]
    labels = torch.tensor([names.index(row["id"]) for row in chosen])
    return torch.stack(crops).permute(0, 3, 1, 2) / 127.5 - 1, torch.tensor(marks), labels


@pytest.mark.parametrize("name, same, different", [(RETAIL, 0.5, 0.1), (MOBILE, 0.5, 0.1), ("embedded", 0.35, 0.15)])
def test_people_are_told_apart(shared, name, same, different):
    recogniser = load(name if name == "embedded" else shared / name)
    crops, landmarks, labels = some_faces(shared, people=5, photos=3)
    for points in (landmarks, None):
        embeddings = recogniser.embed(crops, points)
        cosine = embeddings @ embeddings.T
        equal = labels[:, None] == labels
        other = ~torch.eye(len(labels), dtype=torch.bool)
        assert cosine[equal & other].mean() > same
        assert cosine[~equal].mean() < different


# ------------------------------------------------------------------------------------------------------ ONNX


def tiny_onnx(path, batch: int | str, scaled: bool):
    """A convolution and a mean, with or without the pixel range in the graph; returns what it computes."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    helper, proto = onnx.helper, onnx.TensorProto
    weight = np.random.default_rng(0).standard_normal((6, 3, 5, 5)).astype(np.float32)
    values = {"w": weight, "mean": np.float32(127.5), "scale": np.float32(1 / 127.5)}
    nodes = [helper.make_node("Sub", ["x", "mean"], ["a"]), helper.make_node("Mul", ["a", "scale"], ["b"])]
    nodes = nodes if scaled else []
    nodes += [helper.make_node("Conv", ["b" if scaled else "x", "w"], ["c"]),
              helper.make_node("Relu", ["c"], ["r"]), helper.make_node("GlobalAveragePool", ["r"], ["d"]),
              helper.make_node("Flatten", ["d"], ["y"])]
    used = values if scaled else {"w": weight}
    graph = helper.make_graph(
        nodes, "tiny", [helper.make_tensor_value_info("x", proto.FLOAT, [batch, 3, 112, 112])],
        [helper.make_tensor_value_info("y", proto.FLOAT, [batch, 6])],
        [onnx.numpy_helper.from_array(np.asarray(value), key) for key, value in used.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, str(path))
    return lambda x: torch.conv2d(x, torch.from_numpy(weight)).relu().mean((2, 3))


@pytest.mark.parametrize("batch", [1, "N"])
@pytest.mark.parametrize("scaled", [False, True])
def test_onnx_scores(tmp_path, batch, scaled):
    plain = tiny_onnx(tmp_path / "arc.onnx", batch, scaled)
    recogniser = load(tmp_path / "arc.onnx")
    images = noise(3, 3, 128, 128)
    expected = nn.functional.normalize(plain(recogniser.align(images)), dim=1)
    torch.testing.assert_close(recogniser.embed(images), expected, rtol=1e-4, atol=1e-5)
    assert recogniser.digest == hashlib.sha256((tmp_path / "arc.onnx").read_bytes()).hexdigest()
    first = ["Sub", "Mul", "Conv"] if scaled else ["Conv", "Relu", "GlobalAveragePool"]
    assert first_operations((tmp_path / "arc.onnx").read_bytes(), 3) == first
    with pytest.raises(ConfigError, match="only scores"):
        recogniser.embed(images.requires_grad_())
    with pytest.raises(ConfigError, match="only scores"):
        recogniser.perceive(images.detach())


@pytest.mark.parametrize("error, code, said", [
    (ConfigError("nope.yml: no such configuration file"), 2, "error: nope.yml: no such configuration file"),
    (OSError(28, "No space left on device", "run"), 2,
     "error: run: No space left on device; free some space, or write elsewhere"),
    (KeyboardInterrupt(), 130, "interrupted"),
])
def test_a_distillation_that_ends_early_says_why_in_a_line(error, code, said, monkeypatch, capsys):
    from metagpen.recognise import distil

    def raises(path):
        raise error

    monkeypatch.setattr("sys.argv", ["distil", "-c", "any.yml"])
    monkeypatch.setattr(distil.DistilConfig, "from_yaml", raises)
    with pytest.raises(SystemExit) as left:
        distil.main()
    assert left.value.code == code and capsys.readouterr().err == f"{said}\n"


def test_a_recogniser_is_known_by_its_weights_wherever_they_lie(tmp_path, tiny_recogniser):
    class Elsewhere(nn.Module):
        """As an ONNX network is for torch: without a weight."""

        def __init__(self, digest):
            super().__init__()
            self.digest = digest

    first, second = (Recogniser("net", Elsewhere(digest), InputSpec(), 4) for digest in ("aa", "bb"))
    assert (first.digest, second.digest) == ("aa", "bb")
    assert judges.weights_of(first) != judges.weights_of(second)
    assert tiny_recogniser.digest == digest_of(tiny_recogniser.state_dict())
    assert judges.weights_of(tiny_recogniser) == tiny_recogniser.digest[:12]


# ---------------------------------------------------------------------------------------------- verification


def test_best_threshold_and_accuracy():
    scores = np.array([0.1, 0.2, 0.6, 0.7, 0.8, 0.3])
    same = np.array([False, False, True, True, True, False])
    assert 0.3 < best_threshold(scores, same) < 0.6
    random = np.random.default_rng(0)
    truth = random.random(2000) < 0.5
    assert accuracy(truth + random.normal(0, 0.01, 2000), truth)[0] == 1.0
    assert accuracy(truth.astype(float), truth)[0] == 1.0  # many equal scores
    assert abs(accuracy(random.random(2000), truth)[0] - 0.5) < 0.05
    wrong = random.random(2000) < 0.1  # every tenth answer is turned round
    assert abs(accuracy(np.where(wrong, ~truth, truth).astype(float), truth)[0] - 0.9) < 0.02


def test_pairs_are_balanced_and_fixed():
    people = [name for name in "abcdef" for _ in range(6)]
    index, same = pairs(people, most=50, seed=3)
    assert same.sum() == 50 and len(same) == 100
    assert all((people[i] == people[j]) == s for (i, j), s in zip(index, same))
    assert len({tuple(pair) for pair in index}) == 100
    assert (pairs(people, most=50, seed=3)[0] == index).all()
    with pytest.raises(DataError, match="two people"):
        pairs(["a", "a"])
    identity = torch.eye(6).repeat_interleave(6, 0)
    assert verification(identity, people)["accuracy"] == 1.0


# ---------------------------------------------------------------------------------------------- distillation


def distilling(folder, shared):
    from metagpen.recognise.distil import DistilConfig, Trainer

    config = DistilConfig(teacher=str(shared / RETAIL), photos=str(shared / "photos"), output=str(folder), faces=4,
                          degraded=2, apart=2, steps=4, warmup=1)
    return Trainer(config)


def test_distillation_resumes_to_the_same_numbers(tmp_path, shared):
    faces = torch.randint(0, 256, (8, 3, 160, 160), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    straight = distilling(tmp_path / "a", shared)
    straight.measure(faces)
    for _ in range(3):  # two apart, one joined
        straight.train_step(faces)
    broken = distilling(tmp_path / "b", shared)
    broken.measure(faces)
    broken.train_step(faces), broken.save()
    resumed = distilling(tmp_path / "b", shared)
    assert resumed.resume() and resumed.step == 1
    for _ in range(2):
        last = resumed.train_step(faces)
    assert -1 < last["cosine_degraded"] < 1 and last["map0"] > 0
    for ours, theirs in zip(resumed.average.state_dict().values(), straight.average.state_dict().values()):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    resumed.config.rate *= 2
    with pytest.raises(ConfigError, match="holds a run with rate = 0.003, now it is 0.006"):
        resumed.resume()


@pytest.fixture
def few_faces(shared, tmp_path, monkeypatch):
    """What makes trainers of four steps, two apart and two joined, on six random faces."""
    from metagpen.recognise import distil

    people = SimpleNamespace(photos=list, items=lambda: [("ada", [0, 1, 2]), ("bob", [3, 4, 5])])
    monkeypatch.setattr(distil, "people_of", lambda config, part: people)
    monkeypatch.setattr(distil, "read_faces", lambda photos, margin=16: torch.randint(
        0, 256, (6, 3, 128 + 2 * margin, 128 + 2 * margin), dtype=torch.uint8,
        generator=torch.Generator().manual_seed(margin)))
    return partial(distilling, tmp_path / "run", shared)


def test_the_log_of_a_distillation_holds_means_over_the_steps_that_had_a_term(few_faces):
    trainer = few_faces()
    terms, plain = [], trainer.train_step
    trainer.train_step = lambda faces: terms.append(plain(faces)) or terms[-1]
    trainer.run(Console(quiet=True))
    lines = [json.loads(line) for line in (trainer.output / "log.jsonl").read_text().splitlines()]
    logged, = [line for line in lines if line["event"] == "train"]
    assert logged["step"] == 4
    for name in ("loss", "map0", "relation", "cosine_degraded"):  # the last two of the joined steps alone
        values = [float(one[name]) for one in terms if name in one]
        assert logged[name] == pytest.approx(sum(values) / len(values), rel=1e-5)


def test_a_distillation_whose_numbers_are_not_finite_stops_before_they_are_saved(few_faces):
    trainer = few_faces()
    plain = trainer.train_step

    def broken(faces):
        terms = plain(faces)
        if trainer.step == 4:
            next(iter(trainer.average.state_dict().values())).fill_(float("nan"))
            return terms | {"loss": torch.tensor(float("nan"))}
        return terms

    trainer.train_step = broken
    with pytest.raises(ConfigError, match="step 4: a loss or gradient is not finite"):
        trainer.run(Console(quiet=True))
    with pytest.raises(ConfigError, match="step 4: a loss or gradient is not finite"):
        trainer.save()
    assert not (trainer.output / "state.pt").exists()


def test_an_interrupted_distillation_is_saved_and_goes_on(few_faces, monkeypatch):
    from metagpen.recognise import distil

    plain = distil.Trainer.train_step

    def interrupted(trainer, faces):
        if trainer.step == 2:
            raise KeyboardInterrupt
        return plain(trainer, faces)

    monkeypatch.setattr(distil.Trainer, "train_step", interrupted)
    config = few_faces().config
    with pytest.raises(KeyboardInterrupt):
        distil.distil(config)
    resumed = few_faces()
    assert resumed.resume() and resumed.step == 2
    monkeypatch.setattr(distil.Trainer, "train_step", plain)
    assert distil.distil(config).step == 4


def test_a_damaged_state_of_a_distillation_is_named_with_what_to_do(few_faces):
    trainer = few_faces()
    path = trainer.output / "state.pt"
    path.write_bytes(b"half")
    with pytest.raises(CheckpointError, match=r"state\.pt: damaged .*; delete it to begin again"):
        trainer.resume()
    torch.save({"step": 3}, path)
    with pytest.raises(CheckpointError, match=r"state\.pt: not a state of this training .*; delete it to begin again"):
        trainer.resume()


def test_augmentation_is_seeded_and_in_range():
    from metagpen.recognise.distil import blend, degrade, jitter, tint

    faces = noise(8, 3, 160, 160)

    def augment(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        views = tint(blend(jitter(faces, generator), 0.5, generator), generator)
        return torch.stack([views, degrade(views, generator)])

    first = augment(0)
    assert first.shape == (2, 8, 3, 128, 128) and first.abs().max() <= 1
    torch.testing.assert_close(augment(0), first, rtol=0, atol=0)
    assert (augment(1) - first).abs().mean() > 0.01


def test_embedded_card(embedded):
    from importlib.resources import files

    from metagpen.tensors import read_tensors

    state, card = read_tensors(files("metagpen") / "weights" / "embedded_recogniser.safetensors")
    assert all(value.dtype == torch.float16 for value in state.values())
    assert {"architecture", "teacher", "data", "template", "accuracy", "terms"} <= set(card)
    assert "research use" in card["terms"]
    assert json.loads(card["accuracy"])
