"""Parameters as one vector."""

import pytest
import torch as th

from sb3_ppo_ext.numerics import assign_flat_, flat_grad, flatten, unflatten_like


def test_flatten_and_back() -> None:
    tensors = [th.tensor([[1.0, 2.0], [3.0, 4.0]]).T, th.tensor(5.0), th.tensor([6.0, 7.0])]
    flat = flatten(tensors)
    assert flat.tolist() == [1.0, 3.0, 2.0, 4.0, 5.0, 6.0, 7.0]
    pieces = unflatten_like(flat, tensors)
    assert [piece.shape for piece in pieces] == [(2, 2), (), (2,)]
    assert all(piece.equal(tensor) for piece, tensor in zip(pieces, tensors, strict=True))


def test_flatten_of_one_tensor_is_a_copy() -> None:
    tensor = th.ones(3)
    flatten([tensor]).zero_()
    assert tensor.equal(th.ones(3))


def test_assign_writes_in_place_and_keeps_the_tensors() -> None:
    weight = th.nn.Parameter(th.zeros(3, 2).T)  # not contiguous
    scale = th.nn.Parameter(th.tensor(0.0))
    storage = weight.data_ptr()
    assign_flat_([weight, scale], th.arange(7.0))
    assert weight.tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert scale.item() == 6.0
    assert weight.data_ptr() == storage
    assert weight.requires_grad
    assert weight.is_leaf


def test_flat_grad_has_zeros_where_nothing_is_reached() -> None:
    x = th.tensor([1.0, 2.0], requires_grad=True)
    unused = th.ones(2, 1, requires_grad=True)
    y = th.tensor(3.0, requires_grad=True)
    output = (x * x).sum() * y
    assert flat_grad(output, [x, unused, y], retain_graph=True).tolist() == [6.0, 12.0, 0.0, 0.0, 5.0]
    assert flat_grad(output, [y, x]).tolist() == [5.0, 6.0, 12.0]
    assert x.grad is None


def test_flat_grad_of_a_vector_and_of_a_gradient() -> None:
    x = th.tensor([1.0, 2.0], requires_grad=True)
    cube = x**3
    assert flat_grad(cube, [x], grad_output=th.tensor([1.0, -1.0]), retain_graph=True).tolist() == [3.0, -12.0]
    gradient = flat_grad(cube.sum(), [x], create_graph=True)
    assert flat_grad(gradient.sum(), [x]).tolist() == [6.0, 12.0]


def test_wrong_arguments() -> None:
    parameters = [th.zeros(2, requires_grad=True), th.zeros(1, requires_grad=True)]
    with pytest.raises(ValueError, match=r"shape \(4,\): it must be \(3,\)"):
        unflatten_like(th.zeros(4), parameters)
    with pytest.raises(ValueError, match=r"shape \(1, 3\): it must be \(3,\)"):
        assign_flat_(parameters, th.ones(1, 3))
    assert flatten(parameters).tolist() == [0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="tensors"):
        flatten([])
