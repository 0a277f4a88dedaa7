"""The pictures of the README: each is drawn from a real computation, small, and has real text."""

import re

import pytest

from test_all import data, kernel, tiles  # isort: skip  (sets JAX up)

from results import pictures


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    return folder, {draw.__name__: draw(folder) for draw in (
        pictures.draw_kernel, pictures.draw_sheets, pictures.draw_solve, pictures.draw_curves)}


@pytest.mark.parametrize("name, words", [
    ("kernel", ["K of 300 digits", "the device that"]), ("sheets", ["a=4", "r′=3", "3 × 3 window"]),
    ("solve", ["no preconditioner", "Jacobi", "low rank"]), ("curves", ["cnn_vec", "myrtle10", "test accuracy"])])
def test_pictures_are_small_and_have_text(drawn, name, words):
    """Each is an SVG under 60 KB, whose words are text, without a background of its own."""
    text = (drawn[0] / f"{name}.svg").read_text()
    assert text.startswith("<?xml") and len(text.encode()) < 60 * 1024
    assert all(re.search(rf"<text[^>]*>[^<]*{re.escape(word)}|<tspan[^>]*>[^<]*{re.escape(word)}", text) for word in words)


def test_pictures_owners_are_those_of_tiles(drawn):
    """The device written in a tile is the one that tiles.computed gives it to."""
    x = data.load("digits", n_train=300)[0].astype("float32")
    seen, fn = {}, kernel.kernel_fn("fc", "nngp")
    K = tiles.empty(300, 300, 60, True)
    for step, (key, _) in enumerate(tiles.computed(fn, [(0, x), (1, x)], K.sides, list(K.keys()))):
        seen.setdefault(step % 4 if step < 12 else step - 12, []).append(key)
    owners = drawn[1]["draw_kernel"]
    assert set(owners) == set(K.keys()) and sorted(set(owners.values())) == [0, 1, 2, 3]
    for keys in seen.values():
        assert len({owners[key] for key in keys}) == 1


def test_pictures_solve_says_that_rank_helps(drawn):
    """The picture of the solver shows what it is for: low rank needs fewer than half of the steps, more rank fewer still."""
    steps = [info.iterations for info in drawn[1]["draw_solve"].values()]
    assert 2 * steps[2] < min(steps[:2]) and steps[3] < steps[2]


def test_pictures_curves_are_at_most_eight(drawn):
    """At most eight curves, each rising with n."""
    points = drawn[1]["draw_curves"]
    assert 4 <= len(points) <= 8 and all(len(of) >= 3 for of in points.values())
