"""A seeded network with images and labels, and the norms and orders to draw from; shared by the tests of attacks."""

from hypothesis import strategies as st
from nets import NORMS, ORDERS, images, labels, relu

norms = st.sampled_from(NORMS)
orders = st.one_of(st.sampled_from(ORDERS), st.floats(1.1, 20))


def case(seed: int = 0, n: int = 24, make=relu, wrong: int = 5, **where):
    model, x = make(seed=seed), images(n, seed=seed, **where)
    return model, x, labels(model, x, wrong)
