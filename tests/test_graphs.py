"""The operators and the model outside eager mode: opcheck, TorchScript, torch.compile, torch.export, Meta."""

import io

import pytest
import torch
from test_ffn import arguments_of as ffn_arguments
from test_operators import depthwise_arguments, haar_arguments, scan_arguments
from test_torch_func import OPERATORS

import mobilemamba
from mobilemamba import ops

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_scan(dtype):
    arguments = scan_arguments(2, 5, 7, 3, 2, dtype=dtype, requires_grad=True)
    checks = dict(atol=1e-2, rtol=1e-2) if dtype.itemsize == 2 else {}
    torch.library.opcheck(torch.ops.mobilemamba.bidirectional_scan, arguments, **checks)
    grad = torch.randn(2, 5, 7, dtype=dtype)
    # of the backward operator, gradients are refused: all other properties hold
    torch.library.opcheck(
        torch.ops.mobilemamba.bidirectional_scan_backward,
        [grad.requires_grad_(), *arguments],
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
    torch.library.opcheck(
        torch.ops.mobilemamba.bidirectional_scan_backward, [grad.detach(), *[x.detach() for x in arguments]]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_haar(dtype):
    image, weight = haar_arguments(2, 3, 5, 4, 3, dtype=dtype, requires_grad=True)
    checks = dict(atol=1e-2, rtol=1e-2) if dtype.itemsize == 2 else {}
    torch.library.opcheck(torch.ops.mobilemamba.haar_conv2d, (image, weight), **checks)
    grad = torch.randn(2, 3, 5, 4, dtype=dtype, requires_grad=True)
    torch.library.opcheck(torch.ops.mobilemamba.haar_conv2d_backward_weight, (grad, image, 3), **checks)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("stride", "activation", "count"), [(1, "silu", 4), (2, "none", 2)])
def test_opcheck_depthwise(dtype, stride, activation, count):
    arguments = depthwise_arguments(2, 3, 5, 4, 3, stride, dtype=dtype, requires_grad=True)
    checks = dict(atol=1e-2, rtol=1e-2) if dtype.itemsize == 2 else {}
    options = {"stride": stride, "activation": activation}
    torch.library.opcheck(torch.ops.mobilemamba.depthwise_conv2d, arguments[:count], options, **checks)
    image, weight, bias, grad = arguments
    backward = [grad, image, weight, bias if count > 2 else None, stride, activation]
    # of the backward operator, gradients are refused: all other properties hold
    torch.library.opcheck(
        torch.ops.mobilemamba.depthwise_conv2d_backward,
        backward,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in backward]
    torch.library.opcheck(torch.ops.mobilemamba.depthwise_conv2d_backward, detached)


def test_meta_of_depthwise_is_like_the_cpu():
    operators = torch.ops.mobilemamba.depthwise_conv2d, torch.ops.mobilemamba.depthwise_conv2d_backward
    for shape in ((2, 3, 7, 6, 3, 1), (2, 3, 7, 6, 3, 2), (1, 1, 1, 1, 1, 1), (0, 3, 4, 4, 5, 2), (2, 3, 0, 4, 3, 1)):
        for dtype in (torch.float32, torch.bfloat16):
            image, weight, bias, residual = depthwise_arguments(*shape, dtype=dtype)
            forward, backward = (image, weight, bias, residual, shape[-1]), (residual, image, weight, bias, shape[-1])
            for operator, arguments in zip(operators, (forward, backward), strict=True):
                meta = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in arguments]
                for a, b in zip(outputs(operator(*arguments, "silu")), outputs(operator(*meta, "silu")), strict=True):
                    assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def outputs(result):
    return result if isinstance(result, (tuple, list)) else (result,)


def test_meta_has_the_shapes_strides_and_dtypes_of_the_cpu():
    for arguments in (scan_arguments(2, 5, 7, 3, 2), scan_arguments(1, 1, 1), scan_arguments(0, 3, 4)):
        grad = torch.randn_like(arguments[0])
        real = torch.ops.mobilemamba.bidirectional_scan_backward(grad, *arguments)
        meta = torch.ops.mobilemamba.bidirectional_scan_backward(grad.to("meta"), *[x.to("meta") for x in arguments])
        for a, b in zip(real, meta, strict=True):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


@pytest.mark.parametrize("mode", ["script", "compile"])
def test_operators_give_the_same_gradients(mode):
    def scan(u, delta, A_log, B, C, D, dt_weight, dt_bias):
        y = ops.bidirectional_scan(u, delta, A_log, B, C, D, dt_weight, dt_bias)
        return torch.sin(y)

    def haar(image, weight):
        return torch.sin(ops.haar_conv2d(image, weight))

    def depthwise(image, weight, bias, residual):
        y = ops.depthwise_conv2d(image, weight, bias, residual, activation="silu")
        return torch.sin(y) + ops.depthwise_conv2d(image, weight)

    def depthwise_strided(image, weight, bias, residual):
        return torch.sin(ops.depthwise_conv2d(image, weight, bias, residual, 2, "relu"))

    def feed_forward(x, residual, expand_weight, expand_bias, project_weight, project_bias):
        y = ops.ffn(x, residual, expand_weight, expand_bias, project_weight, project_bias)
        return torch.sin(y) + ops.ffn(x, None, expand_weight, expand_bias, project_weight, project_bias)

    ffn_sizes = [[x.requires_grad_() for x in ffn_arguments(n, 5, 3, 4, 9)] for n in (2, 3, 4)]
    for function, arguments in (
        (feed_forward, ffn_sizes),
        (scan, [scan_arguments(2, 5, n, 3, requires_grad=True) for n in (7, 9, 4)]),
        (haar, [haar_arguments(2, 3, n, 6, 3, requires_grad=True) for n in (7, 8, 5)]),
        (depthwise, [depthwise_arguments(2, 3, n, 6, 3, requires_grad=True) for n in (7, 8, 5)]),
        (depthwise_strided, [depthwise_arguments(2, 3, n, 6, 3, 2, requires_grad=True) for n in (7, 8, 5)]),
    ):
        torch.compiler.reset()
        if mode == "script":
            transformed = torch.jit.script(function)
        else:
            transformed = torch.compile(function, fullgraph=True, dynamic=True)
        for sizes in arguments:
            expected = torch.autograd.grad(function(*sizes).sum(), sizes)
            actual = torch.autograd.grad(transformed(*sizes).sum(), sizes)
            for a, b in zip(actual, expected, strict=True):
                torch.testing.assert_close(a, b)


class Scan(torch.nn.Module):
    def forward(self, *arguments):
        return ops.bidirectional_scan(*arguments)


def test_operators_exported():
    batch, length = torch.export.Dim("b"), torch.export.Dim("l")
    varying = {0: batch, 3: length}
    shapes = {"arguments": ({0: batch, 2: length}, varying, None, varying, varying, None, None, None)}
    program = torch.export.export(Scan(), tuple(scan_arguments(2, 5, 7, 3)), dynamic_shapes=shapes)
    for arguments in (scan_arguments(3, 5, 70, 3), scan_arguments(2, 5, 2, 3)):
        assert torch.equal(program.module()(*arguments), ops.bidirectional_scan(*arguments))


class Depthwise(torch.nn.Module):
    def forward(self, image, weight, bias):
        return ops.depthwise_conv2d(image, weight, bias, stride=2, activation="relu")


def test_depthwise_exported():
    # torch.export treats a size of 1 as a case of its own: from 3 pixels on, the output has at least 2
    batch, height, width = torch.export.Dim("b"), *(torch.export.Dim(n, min=3) for n in "hw")
    shapes = ({0: batch, 2: height, 3: width}, None, None)
    program = torch.export.export(Depthwise(), tuple(depthwise_arguments(2, 3, 7, 6, 3)[:3]), dynamic_shapes=shapes)
    for size in ((3, 3, 8, 15), (2, 3, 3, 5)):
        arguments = depthwise_arguments(*size, 3)[:3]
        assert torch.equal(program.module()(*arguments), Depthwise()(*arguments))


class FeedForward(torch.nn.Module):
    def forward(self, *arguments):
        return ops.ffn(*arguments)


def test_ffn_exported():
    batch, height = torch.export.Dim("b"), torch.export.Dim("h")
    varying = {0: batch, 2: height}
    shapes = {"arguments": (varying, varying, None, None, None, None)}
    program = torch.export.export(FeedForward(), tuple(ffn_arguments(2, 5, 3, 4, 9)), dynamic_shapes=shapes)
    for arguments in (ffn_arguments(3, 5, 7, 4, 9), ffn_arguments(5, 5, 2, 4, 9)):
        assert torch.equal(program.module()(*arguments), FeedForward()(*arguments))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return mobilemamba.nano().eval()


IMAGES = [(2, 1, 28, 28), (3, 1, 37, 19), (1, 1, 9, 64)]


@pytest.mark.parametrize("fused", [False, True])
def test_model_scripted_and_loaded_again(model, fused):
    model = model.fuse() if fused else model
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for shape in IMAGES:
        x = torch.randn(shape)
        torch.testing.assert_close(loaded(x), model(x))


class Stages(torch.nn.Module):
    def __init__(self, model: mobilemamba.MobileMamba):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        return self.model.forward_features(images, stages=True)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of the checks of the input's shape
@pytest.mark.parametrize("fused", [False, True])
def test_model_traced_at_one_size_runs_at_any(fused):
    """12 images are several parts of a batch for each layer that takes parts; a trace keeps none of them."""
    model = mobilemamba.nano(depths=(1, 1, 1)).eval()
    model = model.fuse() if fused else model
    for network, batch in ((model, 8), (Stages(model), 12)):
        traced = torch.jit.trace(network, torch.randn(batch, 1, 28, 28), check_trace=False)
        if fused:
            kinds = [node.kind() for node in traced.inlined_graph.nodes()]
            assert kinds.count("mobilemamba::backbone") == 1
        for shape in ((1, 1, 28, 28), (32, 1, 17, 28), (3, 1, 1, 1)):
            x = torch.randn(shape)
            with torch.jit.optimized_execution(False):  # which costs more time than the calls
                results = outputs(traced(x))
            for actual, expected in zip(results, outputs(network(x)), strict=True):
                torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_traced_at_one_size_runs_at_any(name):
    """Also where the other size has another number of parts of a batch."""
    function, arguments, images = OPERATORS[name]
    traced = torch.jit.trace(function, arguments)
    many = [torch.cat([x] * 9) if i in images else x for i, x in enumerate(arguments)]
    one = [x[:1] if i in images else x for i, x in enumerate(arguments)]
    for other in (one, many):
        torch.testing.assert_close(traced(*other), function(*other))


def test_distilled_model_scripted():
    model = mobilemamba.nano(distillation=True)
    scripted = torch.jit.script(model)
    x = torch.randn(2, 1, 28, 28)
    assert len(scripted(x)) == 2
    torch.testing.assert_close(scripted.eval()(x), model.eval()(x))


@pytest.mark.parametrize("fused", [pytest.param(False, marks=pytest.mark.full), True])
def test_model_compiled_for_any_size(fused):
    """Whole graph, symbolic batch and image size. (Tracing costs the time, so the backend is the quickest one.)"""
    torch.compiler.reset()
    model = mobilemamba.nano(depths=(1, 1, 1)).eval()
    model = model.fuse() if fused else model
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for shape in ((12, 1, 40, 36), (3, 1, 37, 51)):
            x = torch.randn(shape)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_model_compiled_for_training():
    torch.compiler.reset()
    torch.manual_seed(0)
    model = mobilemamba.nano().double()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 1, 28, 28, dtype=torch.float64)
    names, parameters = zip(*model.named_parameters(), strict=True)
    expected = torch.autograd.grad(model(x).sin().sum(), parameters)
    actual = torch.autograd.grad(compiled(x).sin().sum(), parameters)
    for name, a, b in zip(names, actual, expected, strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


class Detector(torch.nn.Module):
    def __init__(self, backbone: mobilemamba.MobileMamba):
        super().__init__()
        self.backbone = backbone

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        maps = self.backbone.forward_features(images, stages=True)
        return [m.relu() for m in maps]


class Segmenter(torch.nn.Module):
    def __init__(self, backbone: mobilemamba.MobileMamba):
        super().__init__()
        self.backbone = backbone

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.backbone.forward_features(images).relu()


class Chooser(torch.nn.Module):
    def __init__(self, backbone: mobilemamba.MobileMamba):
        super().__init__()
        self.backbone = backbone

    def forward(self, images: torch.Tensor, stages: bool) -> list[torch.Tensor]:
        return self.backbone.forward_features(images, stages)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", [Detector, Segmenter])
def test_features_scripted_and_loaded_again(model, kind, fused):
    """The types of the results are known to TorchScript: a list of maps with ``stages=True``, one map without."""
    network = kind(model.fuse() if fused else model)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(network), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for shape in IMAGES:
        x = torch.randn(shape)
        expected, actual = network(x), loaded(x)
        assert type(actual) is type(expected)
        torch.testing.assert_close(actual, expected)


def test_scripted_features_refuse_a_flag_that_asks_for_one_map(model):
    """The type of a result cannot depend on the value of an argument in TorchScript."""
    scripted, x = torch.jit.script(Chooser(model)), torch.randn(IMAGES[0])
    assert len(scripted(x, True)) == 3
    with pytest.raises(torch.jit.Error, match="expected stages=True or no stages in TorchScript, got stages=False"):
        scripted(x, False)


@pytest.mark.parametrize("fused", [False, True])
def test_model_exported(model, fused):
    model = model.fuse() if fused else model
    # torch.export treats a size of 1 as a case of its own: from 17 pixels on, the last map of nano has at least 2
    batch, height, width = torch.export.Dim("b", max=512), *(torch.export.Dim(n, min=17, max=512) for n in "hw")
    program = torch.export.export(
        model, (torch.randn(2, 1, 40, 44),), dynamic_shapes=({0: batch, 2: height, 3: width},), strict=False
    )
    for shape in ((2, 1, 28, 28), (3, 1, 37, 19), (1, 1, 17, 64)):
        x = torch.randn(shape)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)
