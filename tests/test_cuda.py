"""On CUDA: every recipe against float64 on the CPU, no host synchronisation, determinism, one graph."""

import json
import warnings

import pytest
import torch
from waiting import nothing_waits

from moekit import MoE
from moekit.experts import batched, grouped, loop
from moekit.recipes import Recipe, deepseek_moe, mixtral, names, olmoe, openlm, switch
from moekit.recipes.automatic import automatic
from moekit.types import GroupedMatmul, Groups

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

RECIPES = {
    "openlm": openlm,
    "switch": switch,
    "mixtral": mixtral,
    "olmoe": lambda **options: olmoe(k=3, **options),
    "deepseek_moe": lambda **options: deepseek_moe(k=2, num_shared=2, **options),
}
CASES = [
    ("openlm", grouped),
    ("openlm", batched),
    ("openlm", loop),
    ("switch", grouped),
    ("mixtral", grouped),
    ("mixtral", loop),
    ("olmoe", grouped),
    ("deepseek_moe", grouped),
]


def pair(recipe: Recipe, dtype: torch.dtype) -> tuple[MoE, MoE]:
    """Make the same layer twice: on CUDA in ``dtype``, and on the CPU in float64 with the loop."""
    torch.manual_seed(0)
    fast = MoE(64, 8, recipe, hidden=96).to("cuda", dtype)
    exact = MoE(64, 8, recipe, hidden=96).double()
    exact.load_state_dict({name: value.double().cpu() for name, value in fast.state_dict().items()})
    return fast, exact


def outcome(moe: MoE, x: torch.Tensor, grad: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.detach().requires_grad_()
    moe.zero_grad()
    output = moe(x)
    torch.autograd.backward([output.y, *output.losses.values()], [grad, *map(torch.ones_like, output.losses.values())])
    gradients = {name: parameter.grad for name, parameter in moe.named_parameters()}
    return {"y": output.y.detach(), "x": x.grad, **gradients}


@pytest.mark.parametrize(("name", "matmul"), CASES, ids=lambda case: case if isinstance(case, str) else case.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradients_equal_float64(name: str, matmul: GroupedMatmul, dtype: torch.dtype) -> None:
    fast, exact = pair(RECIPES[name](matmul=matmul), dtype)
    exact.recipe = RECIPES[name](matmul=loop)
    torch.manual_seed(1)
    x, grad = torch.randn(133, 64).to(dtype), torch.randn(133, 64).to(dtype)
    ours = outcome(fast, x.cuda(), grad.cuda())
    theirs = outcome(exact, x.double(), grad.double())
    # Every product rounds its operands: eight bits in bf16, ten in the tf32 that torch's grouped_mm may use.
    bound = 4e-2 if dtype == torch.bfloat16 else 5e-3
    for key, expected in theirs.items():
        error = (ours[key].double().cpu() - expected).norm() / expected.norm().clamp_min(1e-9)
        assert error < bound, f"{key}: relative error {error:.2e}"


@pytest.mark.parametrize("name", RECIPES)
def test_nothing_reads_the_device(name: str) -> None:
    moe = MoE(64, 8, RECIPES[name](), hidden=96).to("cuda", torch.bfloat16)
    x = torch.randn(128, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    moe(x).y.float().square().sum().backward()  # the first call may set libraries up
    with nothing_waits():
        output = moe(x)
        (output.y.float().square().sum() + sum(output.losses.values())).backward()


@pytest.mark.parametrize("name", RECIPES)
def test_two_runs_are_bit_equal(name: str) -> None:
    moe = MoE(64, 8, RECIPES[name](), hidden=96).to("cuda", torch.bfloat16)
    x, grad = (torch.randn(4096, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    first = {key: value.clone() for key, value in outcome(moe, x, grad).items()}
    for key, value in outcome(moe, x, grad).items():
        assert torch.equal(value, first[key]), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mixtral", "deepseek_moe"])  # with shared experts, it is theirs that the sum reaches
def test_the_gradient_of_a_sum_lies_in_memory(name: str, dtype: torch.dtype) -> None:
    moe = MoE(64, 8, RECIPES[name](), hidden=96).to("cuda", dtype)
    x = torch.randn(128, 64, device="cuda", dtype=dtype)
    one, other = moe(x).y.sum(), moe(x).y
    found = torch.autograd.grad(one, list(moe.parameters()))
    expected = torch.autograd.grad(other, list(moe.parameters()), torch.ones_like(other))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_more_groups_than_torchs_product_takes_are_refused_in_words() -> None:
    for num_groups in (1023, 1024):
        rows, w = (
            torch.ones(shape, device="cuda", dtype=torch.bfloat16) for shape in ((num_groups, 16), (num_groups, 16, 16))
        )
        groups = Groups(torch.ones(num_groups, device="cuda", dtype=torch.int64), None)
        if num_groups == 1023:
            assert (grouped(rows, groups, w) == 16).all()
        else:
            with pytest.raises(ValueError, match="1024 groups; CUDA's grouped_mm takes at most 1023"):
                grouped(rows, groups, w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", RECIPES)
def test_compiles_into_one_graph_with_the_same_gradients(name: str, backend: str, dtype: torch.dtype) -> None:
    torch.compiler.reset()
    moe = MoE(64, 8, RECIPES[name](), hidden=96).to("cuda", dtype)
    x, grad = (torch.randn(128, 64, device="cuda", dtype=dtype) for _ in range(2))
    expected = {key: value.clone() for key, value in outcome(moe, x, grad).items()}
    moe.compile(fullgraph=True, backend=backend)
    found = outcome(moe, x, grad)
    for key, value in expected.items():
        error = (found[key].double() - value.double()).norm() / value.double().norm().clamp_min(1e-9)
        bound = {torch.bfloat16: 4e-2, torch.float16: 5e-3, torch.float32: 1e-3}[dtype]
        assert error < bound, f"{key}: relative error {error:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", names.RECIPES)
def test_the_forward_of_every_recipe_is_captured_in_a_graph(name: str, dtype: torch.dtype) -> None:
    known = names.recipe_options(name)
    options = {key: value for key, value in {"training": False, "vocab_size": 50}.items() if key in known}
    moe = MoE(128, 16, automatic(names.find_recipe(name, **options)), hidden=96).to("cuda", dtype)
    x, ids = torch.randn(2, 3, 64, 128, device="cuda", dtype=dtype), torch.arange(192, device="cuda").view(3, 64) % 50
    with torch.no_grad():
        static, stream = x[0].clone(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                moe(static, token_ids=ids)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = moe(static, token_ids=ids).y
        for each in x:
            static.copy_(each)
            graph.replay()
            assert torch.equal(y, moe(each, token_ids=ids).y)


@pytest.mark.parametrize("name", ["openlm", "mixtral", "deepseek_v3", "expert_choice", "dynamic_k"])
def test_compiles_whole_with_sizes_that_vary(name: str) -> None:
    """400 tokens, then 512, for which Inductor reduces in one step: Triton 3.6 cannot add up ones there."""
    torch.compiler.reset()
    moe = MoE(128, 16, automatic(names.find_recipe(name)), hidden=96).to("cuda", torch.bfloat16)
    compiled = torch.compile(moe, fullgraph=True, dynamic=True)
    for length in (100, 128, 77):
        x = torch.randn(4, length, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        results = []
        for layer in (moe, compiled):
            output = layer(x)
            total = output.y.float().square().sum() + sum(output.losses.values())
            results.append([output.y, *torch.autograd.grad(total, [x, *moe.parameters()])])
        for found, expected in zip(*results, strict=True):
            error = (found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-9)
            assert error < 4e-2, f"{length}: relative error {error:.2e}"


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_one_group_of_all_rows_is_a_product_of_any_dtype_and_widths(dtype: torch.dtype, compiled: bool) -> None:
    """As shared experts are, which run beside routed ones on kernels that take any widths, too."""
    groups = Groups(torch.full((1,), 37, dtype=torch.int32, device="cuda"), capacity=37)
    rows, w = (torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True) for shape in ((37, 19), (1, 19, 23)))
    torch.compiler.reset()
    product = torch.compile(grouped, fullgraph=True) if compiled else grouped
    cotangent = torch.randn(37, 23, device="cuda", dtype=dtype)
    torch.autograd.grad(product(rows, groups, w), (rows, w), cotangent)  # a compiler may wait
    with nothing_waits():
        out = product(rows, groups, w)
        found = torch.autograd.grad(out, (rows, w), cotangent)
    expected = loop(rows, groups, w)
    for a, b in zip((out, *found), (expected, *torch.autograd.grad(expected, (rows, w), cotangent)), strict=True):
        torch.testing.assert_close(a, b)


SHAPE = {"hidden_dim": 64, "n_layers": 2, "n_heads": 2, "seq_len": 64, "vocab_size": 512, "post_embed_norm": False}


@pytest.fixture
def program(tmp_path):
    """Run the training program on small shards, and return the losses of its steps."""
    from moekit.lm.shards import write_shards
    from moekit.lm.trackers import read_metrics
    from moekit.recipes.train import main

    rows = torch.randint(0, 16, (96, 65), generator=torch.Generator().manual_seed(0)).cumsum(1) % 512
    manifest = write_shards(tmp_path / "data", rows, sequences_per_shard=10)
    (tmp_path / "m.json").write_text(json.dumps(SHAPE | {"weight_tying": False}))
    fixed = ["--model", str(tmp_path / "m.json"), "--dataset-manifest", str(manifest), "--logs", str(tmp_path)]

    def run(name: str, *flags: str) -> list[float]:
        words = "--steps 8 --batch-size 8 --log-every-n-steps 1 --save-every-n-steps 3 --lr 1e-3 --workers 0"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, of kernels and compilers
            main([*fixed, *words.split(), "--name", name, *flags])
        return [line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl")]

    yield run
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("precision", ["fp32", "amp", "amp_bfloat16", "bf16"])
def test_the_program_trains_in_every_precision(program, precision: str) -> None:
    losses = program("run", "--precision", precision, "--lr", "1e-2", "--steps", "24", "--multiple-data-passes")
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize(
    "flags", [["--torchcompile"], ["--grad-checkpointing"], ["--grad-checkpointing", "--torchcompile"]]
)
def test_compiled_and_recomputing_runs_have_the_losses_of_a_plain_one(program, flags: list[str]) -> None:
    torch.compiler.reset()
    plain = program("plain", "--recipe", "mixtral")
    assert program("other", "--recipe", "mixtral", *flags) == pytest.approx(plain, rel=5e-3)


@pytest.mark.parametrize("recipe", ["openlm", "gshard", "deepseek_moe"])
def test_a_deterministic_run_goes_on_bit_for_bit(program, tmp_path, recipe: str) -> None:
    flags = ["--recipe", recipe, "--deterministic", "--precision", "amp_bfloat16"]
    whole = program("whole", *flags)
    checkpoint = tmp_path / "whole/checkpoints/step_00000003"
    assert program("part", *flags, "--resume", str(checkpoint)) == whole[3:]
