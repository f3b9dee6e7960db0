import pytest
import torch
from torch._dynamo.testing import CompileCounter

from moekit.parallel.collectives import connect, exchange, gather, narrowed, reduce_scatter, room_for

EXCHANGES = {
    "equal": exchange,
    "counted": lambda x, group: exchange(x, group=group, sent=[x.shape[0]], received=[x.shape[0]]),
    "gather": gather,
    "reduce_scatter": reduce_scatter,
}
every_exchange = pytest.mark.parametrize("move", EXCHANGES.values(), ids=EXCHANGES)


@every_exchange
@pytest.mark.parametrize("shape", [(4, 3), (0, 3), (2,)])
def test_alone_a_rank_gets_its_own_rows(group, move, shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = move(x, group=group)
    assert torch.equal(y, x)
    assert y.data_ptr() != x.data_ptr() or x.numel() == 0
    factors = torch.randn(shape, dtype=torch.float64)
    [grad] = torch.autograd.grad((y * factors).sum(), x)
    assert torch.equal(grad, factors)


@every_exchange
def test_rows_need_not_be_contiguous_nor_their_gradient(group, move):
    x = torch.randn(3, 4).T.requires_grad_()
    y = move(x, group=group)
    assert torch.equal(y, x)
    [grad] = torch.autograd.grad(y.sum(), x)  # of stride 0
    assert torch.equal(grad, torch.ones(4, 3))


@every_exchange
def test_a_gradient_has_a_gradient(group, move):
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    [first] = torch.autograd.grad(move(x * x, group=group).square().sum(), x, create_graph=True)
    torch.testing.assert_close(first, 4 * x**3)
    [second] = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, 12 * x**2)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("shape", [(5, 3), (5,), (0, 2)])
def test_there_may_be_room_for_more_rows_and_rows_that_stay(group, shape, compiled):
    """Rows past those that arrive are filled, and what their gradient is goes nowhere."""
    real, room = min(3, shape[0]), 16

    def move(x):
        return exchange(x, group=group, sent=[real], received=[real], room=room, fill=-1)

    moved = torch.compile(move, backend="aot_eager", fullgraph=True) if compiled else move
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = moved(x)
    assert y.shape == (room, *shape[1:])
    assert torch.equal(y[:real], x[:real])
    assert (y[real:] == -1).all()
    factors = torch.randn(y.shape, dtype=torch.float64)
    factors[real:] = torch.nan
    [grad] = torch.autograd.grad(y, x, factors)
    assert torch.equal(grad[:real], factors[:real])
    assert grad.shape == shape
    assert not grad[real:].any()


def test_a_gradient_has_a_gradient_where_there_is_room(group):
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    y = exchange(x * x, group=group, sent=[3], received=[3], room=16)
    [first] = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    torch.testing.assert_close(first[:3], 4 * x[:3] ** 3)
    [second] = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second[:3], 12 * x[:3] ** 2)
    assert not second[3].any()


@pytest.mark.parametrize("number", [0, 1, 15, 16, 17, 511, 512, 513, 1000, 32_768, 32_769, 1_000_003])
def test_room_is_a_little_more_than_rows(number):
    room = room_for(number)
    assert number <= room <= max(number + number // 32, number + 15)
    assert room % 16 == 0
    assert room_for(room) == room


def test_compiled_code_takes_any_number_of_rows():
    """A compiler that looked at the number would compile for each again, and soon give up."""
    torch.compiler.reset()
    counted = CompileCounter()
    compiled = torch.compile(lambda x, n: x + room_for(n), backend=counted, dynamic=True, fullgraph=True)
    for number in range(500, 1000, 7):
        assert compiled(torch.zeros(()), number) == room_for(number)
    assert counted.frame_count <= 4


def test_few_numbers_of_rows_occur():
    assert len({room_for(number) for number in range(2**15, 2**16)}) <= 34


def test_exchanges_in_both_directions_take_sizes_the_other_way_round(group, monkeypatch):
    """The backward receives what the forward sent, and its own backward sends it again."""
    from moekit.parallel import collectives

    asked = []

    def all_to_all(x, sent, received, group, room, fill):
        asked.append((sent, received))
        return x.new_ones(sum(received), 2)

    monkeypatch.setattr(collectives, "_all_to_all", all_to_all)
    x = torch.ones(3, 2, requires_grad=True)
    y = exchange(x, group=group, sent=[3], received=[5])
    [grad] = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    assert asked == [([3], [5]), ([5], [3])]
    assert grad.shape == (3, 2)
    torch.autograd.grad(grad.sum(), x)
    assert asked[2:] == asked[:2]


def test_connected_tensors_keep_their_values_and_gradient():
    y, other = torch.randn(3, requires_grad=True), torch.randn(2, requires_grad=True)
    connected = connect(y * 2, other * 3)
    assert torch.equal(connected, y * 2)
    grads = torch.autograd.grad((connected * torch.arange(3)).sum(), (y, other), allow_unused=True)
    assert grads[0].tolist() == [0.0, 2.0, 4.0]
    assert grads[1] is None or (grads[1] == 0).all()


def test_the_backward_of_what_a_constant_is_connected_to_runs(group):
    """That is what the other ranks wait for."""
    ran = []

    class Waited(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.set_materialize_grads(True)
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            ran.append(grad)
            return grad

    x, weights = torch.ones(2, 3, requires_grad=True), torch.ones(2, requires_grad=True)
    y = connect(torch.zeros(4, 3), Waited.apply(x), Waited.apply(weights), torch.ones(1))
    y.sum().backward()
    assert sorted(tuple(grad.shape) for grad in ran) == [(2,), (2, 3)]
    assert all((grad == 0).all() for grad in ran)
    assert (x.grad == 0).all()
    assert (weights.grad == 0).all()


def test_nothing_is_connected_where_no_gradient_is_asked_for():
    assert not connect(torch.zeros(1), torch.ones(2)).requires_grad
    with torch.no_grad():
        assert not connect(torch.zeros(1), torch.ones(2, requires_grad=True)).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rows_are_narrowed_to_what_autocast_computes_in(dtype):
    x = torch.ones(2, dtype=dtype)
    assert narrowed(x) is x
    for target in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", target):
            assert narrowed(x).dtype == (target if dtype != torch.float64 else dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert narrowed(x) is x


def test_gradients_are_widened_again():
    x = torch.ones(2, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = narrowed(x)
    [grad] = torch.autograd.grad(y.float().sum(), x)
    assert grad.dtype == torch.float32
