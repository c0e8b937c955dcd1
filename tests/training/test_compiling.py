"""Compiled layers: the same losses and gradients, few compilations, and a word where there is none."""

import gc

import pytest
import torch

from peftcli import methods, sharding
from peftcli.errors import HostError, ModelError
from peftcli.training import compiling
from tests.methods.building import adapt, assert_close, loss_of, packed, randomise, trainable
from tests.tolerances import EXACT, LOSS

# torch's own: its compiler looks at what comes into a layer.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
CPU = torch.device("cpu")
FRONT_END = "aot_eager"
"""Traced and differentiated by torch's compiler, and run without the machine code that takes most of its time."""


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    gc.collect()


def gradients(model, ids):
    """Returns the loss and the trainables' gradients."""
    model.zero_grad()
    torch.manual_seed(5)
    loss = loss_of(model, ids)
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in trainable(model).items()}


def assert_same(found, expected, tolerance):
    assert_close(found[0], expected[0], tolerance)
    for name, gradient in found[1].items():
        assert_close(gradient, expected[1][name], tolerance)


def worst(found, exact):
    """Returns the largest error of any gradient, relative to the largest number in it."""
    return max(float((found[name] - exact[name]).abs().max() / exact[name].abs().max()) for name in exact)


def compiled(model, backend=FRONT_END, **options):
    """Has the layers of `model` compiled, and returns what watches it."""
    watch = compiling.Watch()
    compiling.compile_layers(model, CPU, backend=backend, **options)
    return watch


def graphs(watch):
    return int(watch.summary().split()[1])


def in_a_model(name, make_model, layers=1, **fields):
    model = make_model("llama", num_hidden_layers=layers).train()
    adapt(model, name, ".*proj", **fields)
    randomise(model)
    return model


@pytest.mark.parametrize("name", methods.names())
def test_layers_with_each_method_equal_eager_ones(name, make_model):
    """With the tracing alone; that each method's own arithmetic survives the rest is the contract suite's."""
    model = in_a_model(name, make_model).double()  # the arithmetic is another one where it is compiled
    ids = torch.randint(2, 128, (3, 7))
    keys, expected = set(model.state_dict()), gradients(model, ids)
    watch = compiled(model, "eager")
    assert_same(gradients(model, ids), expected, EXACT[torch.float64])
    assert graphs(watch) == 1
    assert watch.failure(1) is None
    assert set(model.state_dict()) == keys
    assert [type(layer) for layer in sharding.layers(model)] == [type(model.model.layers[0])]


def test_layers_share_their_compilation_and_lengths_are_symbols(make_model):
    """One for the first layer, whose input needs no gradient, and one for all others, whatever is in the batch."""
    model = in_a_model("lora", make_model, layers=4)
    batches = [torch.randint(2, 128, shape) for shape in ((3, 7), (2, 9), (3, 12), (5, 4))]
    expected = [gradients(model, ids) for ids in batches]
    watch = compiled(model)
    for ids, one in zip(batches, expected, strict=True):
        assert_same(gradients(model, ids), one, EXACT[torch.float32])
    assert graphs(watch) == 2


def test_recomputed_layers_drop_the_same(make_model):
    """Of the noise that eager code draws too, if another sample of it: twice the same where it is drawn again."""
    model = in_a_model("lora", make_model, dropout=0.3)
    ids, watch = torch.randint(2, 128, (3, 7)), compiled(model)
    expected = gradients(model, ids)
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert_same(gradients(model, ids), expected, EXACT[torch.float32])
    assert graphs(watch) == 2


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_on_a_packed_base(kind, make_model):
    model = make_model("llama", num_hidden_layers=1).train()
    mlp = model.model.layers[0].mlp
    mlp.up_proj, mlp.down_proj = packed(mlp.up_proj, kind), packed(mlp.down_proj, kind)
    adapt(model, "lora", ".*proj")
    randomise(model)
    ids = torch.randint(2, 128, (3, 7))
    expected, watch = gradients(model, ids), compiled(model)
    assert_same(gradients(model, ids), expected, EXACT[torch.float32])
    assert watch.failure(1) is None


@pytest.mark.parametrize("name", ["lora", "dora", "vera", "hydralora"])
def test_in_mixed_precision(name, make_model):
    """Autocast decides while the code is traced; what is rounded in another order is not further from exact."""
    model, ids = in_a_model(name, make_model), torch.randint(2, 128, (3, 7))
    exact = gradients(model, ids)[1]
    with torch.autocast("cpu", torch.bfloat16):
        (_, eager), watch = gradients(model, ids), compiled(model)
        _, found = gradients(model, ids)
    assert 0 < worst(found, exact) <= 2 * worst(eager, exact)
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    assert watch.failure(1) is None


def test_a_prefix_has_code_for_each_layer(make_model):
    """A layer's place in the cache is a number in its code. Each may have all variants, not only all together."""
    model = make_model("llama", num_hidden_layers=3).train()
    adapt(model, "prefix")
    randomise(model)
    ids = torch.randint(2, 128, (3, 7))
    expected, watch = gradients(model, ids), compiled(model, "eager", alike=False)
    assert_same(gradients(model, ids), expected, LOSS)
    assert graphs(watch) == 3
    assert watch.failure(1) is None


def test_what_is_compiled_no_more_is_said_once(make_model, monkeypatch):
    monkeypatch.setattr(compiling, "VARIANTS", 1)
    model, ids = in_a_model("lora", make_model, layers=2).double(), torch.randint(2, 128, (3, 7))
    expected, watch = gradients(model, ids), compiled(model, "eager")
    assert_same(gradients(model, ids), expected, EXACT[torch.float64])  # the second layer ran as it is
    assert "step 1: a part of the model's layers could not be compiled" in watch.failure(1)
    assert watch.failure(2) is None


def test_set_aside_nothing_is_compiled(make_model):
    model, ids = in_a_model("lora", make_model), torch.randint(2, 128, (3, 7))
    watch = compiled(model, "eager")
    with compiling.set_aside(watch), torch.no_grad():
        model(ids)
    assert graphs(watch) == 0
    gradients(model, ids)
    assert graphs(watch) == 1


def test_a_model_without_layers_is_refused():
    with pytest.raises(ModelError, match=r"training.torch_compile: cannot find this model's layers"):
        compiling.compile_layers(torch.nn.Linear(2, 3), CPU)


def test_without_a_compiler_it_is_said_at_once(monkeypatch):
    from torch._inductor import cpp_builder, exc

    compiling.require_compiler(CPU)

    def none():
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(HostError, match=r"training.torch_compile: there is no C\+\+ compiler") as caught:
        compiling.require_compiler(CPU)
    assert "install g++" in caught.value.problems[0].hint
    with pytest.raises(HostError, match="with Triton, which is not there"):
        compiling.require_compiler(torch.device("cuda"))


def test_without_pythons_headers_it_is_said_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(compiling.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(HostError, match="Python's headers are not there"):
        compiling.require_compiler(CPU)
