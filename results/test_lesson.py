"""lesson.ipynb: its code runs, its text states what the code computes, and what is stored in it is of this code.

The cells run once, in order and in one namespace, and after them the code of the answers, each in a copy of that namespace.
"""

import ast
import contextlib
import inspect
import io
import json
import os
import re
import subprocess
import sys
from decimal import Decimal

from test_all import HERE, OPTIMISED, QUICKLY, as_users_have_it, xla_flags  # isort: skip  (sets JAX up)

import matplotlib
import matplotlib.pyplot as plt
import pytest
from threadpoolctl import threadpool_limits

import augment
import choose
import data
import experiment
import kernel
import pcg
import regression
import tiles
import train_cifar
from results import laws

PATH = os.path.join(HERE, "lesson.ipynb")
with open(PATH, encoding="utf-8") as file:
    LESSON = json.load(file)
CELLS = [(number, cell, "".join(cell["source"])) for number, cell in enumerate(LESSON["cells"])]
CODE = [(number, cell, source) for number, cell, source in CELLS if cell["cell_type"] == "code"]
TEXT = [source for _, cell, source in CELLS if cell["cell_type"] == "markdown"]
STATED = re.compile(r"`(\w+)` = (True|False|-?\d(?:[\d.,e-]*\d)?)")


def split(text):
    """A cell of text without its answer, the answer, and the code of the answer."""
    before, _, after = text.partition("<details>")
    answer, _, after = after.partition("</details>")
    return before + after, answer, "\n".join(re.findall(r"```python\n(.*?)```", answer, re.S))


def run(source, name, namespace):
    """Executes source; returns what it printed, which must not be on stderr. BLAS has one thread: with two, other tests beside
    this one triple its time."""
    out, err = io.StringIO(), io.StringIO()
    with (as_users_have_it(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
          matplotlib.rc_context(), threadpool_limits(1, "blas"), pytest.MonkeyPatch.context() as patch):
        patch.setattr(plt, "show", lambda: None)
        exec(compile(source, name, "exec"), namespace)
        plt.close("all")
    assert not err.getvalue()
    return out.getvalue()


def agrees(value, stated):
    """Whether a value, rounded to the digits of the text, is the text, and would be on a machine that rounds otherwise."""
    if stated in ("True", "False"):
        return str(bool(value)) == stated
    stated = Decimal(stated.replace(",", ""))
    return all(Decimal(float(value) * scale).quantize(stated) == stated for scale in (1 - 1e-4, 1, 1 + 1e-4))


def test_lesson_states_what_it_computes():
    """`states_what_it_computes` holds. It is optimised, without which it takes twice as long, though not by fusing loops."""
    optimised = {**QUICKLY, "xla_backend_optimization_level": OPTIMISED["xla_backend_optimization_level"]}
    done = subprocess.run([sys.executable, "-c", "from results import test_lesson; test_lesson.states_what_it_computes()"],
                          cwd=HERE, env={**os.environ, "XLA_FLAGS": xla_flags(optimised)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def states_what_it_computes():
    """Every code cell runs. Every number that the text gives to a name is the value of that variable; so it is in the answers,
    whose code runs. What the cells print is stored in the file: the same words, numbers within 2 %. The code for CIFAR-10 in
    the last section runs, on digits here, and is right on more than nine in ten."""
    plt.switch_backend("Agg")
    values, count = {"__name__": "lesson"}, 0
    printed = {number: run(source, f"lesson.ipynb, cell {number}", values) for number, _, source in CODE}
    for text in TEXT:
        text, answer, code = split(text)
        space = dict(values)
        run(code, f"answer {code!r}", space)
        for part, where in ((text, values), (answer, space)):
            for name, stated in STATED.findall(part):
                assert agrees(where[name], stated), f"{name} = {stated} in the text, {where[name]} in the code"
                count += 1
    assert count >= 40
    for number, cell, _ in CODE:
        stored = "".join("".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream")
        old, new = (re.split(r"(\d+(?:[.,]\d+)*)", text) for text in (stored, printed[number]))
        assert old[::2] == new[::2], f"cell {number} prints {printed[number]!r}, stored is {stored!r}: execute the notebook"
        for a, b in zip(old[1::2], new[1::2]):
            assert float(a.replace(",", "")) == pytest.approx(float(b.replace(",", "")), rel=0.02, abs=1e-4)
    code, = re.findall(r"```python\n(.*?)```", TEXT[-1], re.S)
    said = run(code.replace('"cifar10", n_train=10_000', '"digits", n_train=300'), "last section", dict(values))
    assert "cifar10" in code and 0.9 < float(said) < 1


def test_lesson_is_stored_whole():
    """The file is a notebook of format 4 under 600 KB, executed from top to bottom. Each cell that shows a picture has one
    stored, and no output is an error or on stderr. It names no folder, clock or machine."""
    assert LESSON["nbformat"] == 4 and os.path.getsize(PATH) < 600_000
    assert [cell["execution_count"] for _, cell, _ in CODE] == list(range(1, len(CODE) + 1))
    assert len({cell["id"] for _, cell, _ in CELLS}) == len(CELLS)
    for number, cell, source in CODE:
        pictures = [output["data"].pop("image/png") for output in cell["outputs"] if "image/png" in output.get("data", {})]
        assert len(pictures) == ("plt.show()" in source), f"cell {number} has {len(pictures)} pictures"
        assert all(output["output_type"] == "display_data" or output.get("name") == "stdout" for output in cell["outputs"])
        assert "it/s" not in str(cell["outputs"]) and "Traceback" not in str(cell["outputs"])
    assert not any(cell["metadata"] for _, cell, _ in CELLS) and set(LESSON["metadata"]) <= {"kernelspec", "language_info"}
    without_pictures = json.dumps(LESSON)
    assert HERE not in without_pictures and not re.search(r"(?<![\w.:/])/(home|root|tmp|work|usr|Users)/", without_pictures)


def test_lesson_has_eight_chapters():
    """There are eight chapters, each with one picture and one exercise, whose answer is folded away; every link to a file
    leads to one, and the figures of CIFAR-10 stand in results/README.md."""
    whole = "".join("%PICTURE%" * source.count("plt.show()") if cell["cell_type"] == "code" else source + "\n\n"
                    for _, cell, source in CELLS)
    _, *chapters = re.split(r"^## ", whole, flags=re.M)
    assert [chapter[:3] for chapter in chapters[:-1]] == [f"{k}. " for k in range(1, 9)]
    for chapter in chapters[:-1]:
        assert chapter.count("<details>") == chapter.count("</details>") == chapter.count("**Exercise.**") == 1
        assert chapter.count("%PICTURE%") == 1 and "<details><summary>Answer</summary>\n\n" in chapter
    assert all(os.path.exists(os.path.join(HERE, link)) for link in re.findall(r"\]\((?!https:)([^)]+)\)", whole))
    with open(os.path.join(HERE, "results", "README.md"), encoding="utf-8") as page:
        results = page.read()
    figures = re.findall(r"(\d\d\.\d\d(?: ± \d\.\d\d)?)\s%", chapters[-1])
    assert len(figures) == 3 and all(f" {figure} |" in results for figure in figures)


def test_lesson_defines_nothing_that_the_core_has():
    """No function of the notebook, or of its answers, has the name of a function or class of the core."""
    core = {name for module in (augment, choose, data, experiment, kernel, laws, pcg, regression, tiles, train_cifar)
            for name, value in vars(module).items()
            if (inspect.isfunction(value) or inspect.isclass(value)) and value.__module__ == module.__name__}
    own = {node.name for source in [source for *_, source in CODE] + [split(text)[2] for text in TEXT]
           for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assert own and not own & core
