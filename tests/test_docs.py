"""What README.md and docs/ show: commands parse, links and named files exist, Python examples use what is there."""

import ast
import functools
import itertools
import json
import pathlib
import re
import runpy
import shlex
import subprocess
import sys
from unittest import mock

import jax
import pytest

from rahf import experiments

ROOT = pathlib.Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS, ROOT / "benchmarks" / "README.md"]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
PACKAGES = ("rahf", "richhf_data", "benchmarks", "launch")
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


# ---------------------------------------------------------------------------------------------- Reading Markdown and shell


def blocks(text: str, language: str = "") -> list[str]:
    """The fenced blocks of a language; those without one hold shell commands."""
    return [body for name, body in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE) if name == language]


def prose(text: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def spans(text: str) -> list[str]:
    """The inline code of a page."""
    return [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", prose(text))]


def commands(script: str) -> list[list[str]]:
    """The commands of a shell script as words, its own variables replaced by their values."""
    variables, found = {}, []
    for line in re.sub(r"\\\n\s*", " ", script).splitlines():
        line = re.sub(r"\$(\w+)", lambda match: variables.get(match[1], match[0]), line)
        for part in line.split(" && "):
            words = shlex.split(part, comments=True)
            assigned = list(itertools.takewhile(lambda word: re.match(r"[A-Z_]+=", word), words))
            variables |= dict(word.split("=", 1) for word in assigned) if assigned == words else {}
            found.append(words[len(assigned) :])
    return [words for words in found if words]


def documented() -> list[list[str]]:
    """Every command of the pages, of the configs' headers and of `make demo`."""
    scripts = [script for page in PAGES for script in blocks(page.read_text())]
    scripts += re.findall(r"^\t\$\(BIN\)/(python -m r.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    scripts += [span for page in PAGES for span in spans(page.read_text()) if re.match(r"python .* --", span)]
    for config in CONFIGS:
        docstring = ast.get_docstring(ast.parse(config.read_text()))
        scripts.append(re.search(r"^ *command +(.*?)^ *hardware", docstring, re.DOTALL | re.MULTILINE)[1])
    return [words for script in scripts for words in commands(script)]


def programs(words: list[str], workdir) -> list[list[str]]:
    """What of a command `parse_commands.py` can check: [module or file, argument, ...].

    Args:
      workdir: a folder with a config, which stands for the workdirs that a command reads its config from.
    """
    if words[0].endswith("xmanager"):
        return [[words[2], *words[words.index("--") + 1 :]]]
    if words[0] != "python":
        return []
    target, *arguments = words[2:] if words[1] == "-m" else words[1:]
    if target.startswith("t5x."):  # test_t5x_trainer.py checks these
        return []
    checked = []
    if target == "launch.tpu_vm" and "--" in arguments:
        cut = arguments.index("--")
        arguments, job = arguments[:cut], arguments[cut + 1 :]
        trainer = ["t5x.train"] if "--t5x" in arguments else ["rahf.train", "--workdir=DIR"]
        job = job if arguments[0] == "run" else ["python", "-m", *trainer, *job]
        checked = programs(job, workdir)
    if target in ("rahf.evaluate", "rahf.predict", "rahf.score", "rahf.serve"):
        arguments = [re.sub("^--workdir=.*", f"--workdir={workdir}", argument) for argument in arguments]
    arguments = [argument.replace("--config=CONFIG", "--config=rahf_ci") for argument in arguments]
    return [[target, *arguments], *checked]


def errors_of(commands: list[list[str]]) -> list[str | None]:
    """What is wrong with the flags of each command, None if nothing is."""
    done = subprocess.run(
        [sys.executable, "tests/parse_commands.py"], input=json.dumps(commands), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@functools.cache
def source(module: str) -> tuple[pathlib.Path, list[str]]:
    """The longest beginning of a dotted name that is a module, and the names that follow it."""
    parts = module.split(".")
    for count in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:count])
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return file, parts[count:]
    return ROOT, parts


def is_there(dotted: str) -> bool:
    """Whether a dotted name is a module, or a name that its module's text has."""
    file, names = source(dotted)
    return not names or (file.is_file() and re.search(rf"\b{names[0]}\b", file.read_text()) is not None)


# ---------------------------------------------------------------------------------------------------------------- Commands


def test_documented_commands_parse(tmp_path):
    (tmp_path / "config.json").write_text(experiments.load("rahf_ci").to_json())
    found = [program for words in documented() for program in programs(words, tmp_path)]
    assert len(found) > 50
    wrong = {  # what the error must name: the command
        "did you mean 'batch_size'": ["rahf.train", "--config=rahf_base", "--workdir=run", "--config.train.batchsize=8"],
        "did you mean 'rahf_base'": ["rahf.train", "--config=rahf_bas", "--workdir=run"],
        "many": ["rahf.train", "--config=rahf_base", "--workdir=run", "--config.train.batch_size=many"],
        "'splits'": ["rahf.evaluate", f"--workdir={tmp_path}", "--splits=test"],
        "--output": ["rahf.predict", f"--workdir={tmp_path}"],
        "dpm++": ["rahf.diffusion.sample", "--model=DIR", "--output=DIR", "--sampler=dpm"],
        "--zone": ["launch.tpu_vm", "setup", "--name=rahf", "--project=PROJECT"],
        "lr": ["launch/xm_launch.py", "--config=configs/rahf_ci.py", "--workdir=run", "--executor=local", "--sweep=lr=1"],
        "'mops'": ["benchmarks/metrics.py", "--mops=1000"],
    }
    errors = errors_of(found + list(wrong.values()))
    failed = [f"{shlex.join(program)}\n  {error}" for program, error in zip(found, errors, strict=False) if error]
    assert not failed, "\n".join(failed)
    for (hint, program), error in zip(wrong.items(), errors[len(found) :], strict=True):
        assert error and hint in error, (program, error)


def test_documented_make_targets_and_extras_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    with mock.patch("setuptools.setup") as setup:
        runpy.run_path(ROOT / "setup.py")
    extras = set(setup.call_args.kwargs["extras_require"])
    text = "\n".join(page.read_text() for page in PAGES)
    assert {"demo", "test"} <= set(re.findall(r"(?:^|`|PATH )make ([\w-]+)", text, re.MULTILINE)) <= targets
    found = {extra for group in re.findall(r"(?:\.|rahf)\[([\w,]+)\]", text) for extra in group.split(",")}
    assert {"data", "tpu"} <= found <= extras


def test_documented_programs_are_known():
    known = {"python", "python3", "make", "pip", "docker", ".venv-xmanager/bin/pip", ".venv-xmanager/bin/xmanager"}
    assert {words[0] for words in documented()} == known


def test_commands_reads_shell_as_a_shell_does():
    script = "A='--x=1 --y'\npython -m m $A --z='a b' \\\n    --w  # note\nP=q make test && make demo\n"
    assert commands(script) == [["python", "-m", "m", "--x=1", "--y", "--z=a b", "--w"], ["make", "test"], ["make", "demo"]]


# ------------------------------------------------------------------------------------------------------------ Files, links


def anchors(page: pathlib.Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)", prose(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pages
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text()))
    for link in links:
        if not re.match("https?://", link):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.is_file(), f"{link}: no such file"
            assert not anchor or anchor in anchors(target), f"{link}: no such heading"


@pages
def test_named_files_and_modules_exist(page):
    names = {file.name for package in (*PACKAGES, "configs", "tests") for file in (ROOT / package).rglob("*")}
    for span in spans(page.read_text()):
        if re.match(r"(rahf|richhf_data|benchmarks|launch|tests|configs|docs)/", span):
            assert (ROOT / span).exists(), f"{span}: no such file or folder"
        elif re.fullmatch(r"\w+\.py", span):
            assert span in names, f"{span}: no such file"
        elif re.fullmatch(r"rahf_\w+|reward_clip|sd_reward|sd_selected", span):
            assert span in experiments.names(), f"{span}: no such config"
        elif match := re.fullmatch(rf"(?:python -m )?((?:{'|'.join(PACKAGES)})(?:\.\w+)+)", span):
            assert is_there(match[1]), f"{span}: no such module, or no such name in it"


@pages
def test_named_config_keys_exist(page):
    configs = [experiments.load(name) for name in experiments.names()]
    for span in spans(page.read_text()):
        for key in re.findall(r"--config\.([a-z_0-9.]+)", span):
            parts = key.split(".")
            assert any(_has(config, parts) for config in configs), f"{span}: no config has this key"


def _has(node, parts) -> bool:
    return not parts or (hasattr(node, "keys") and parts[0] in node and _has(node[parts[0]], parts[1:]))


# ------------------------------------------------------------------------------------------------------------------ Python


@pages
def test_python_examples_use_what_is_there(page):
    for script in blocks(page.read_text(), "python"):
        tree, bound = ast.parse(script), {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                bound |= {alias.asname or alias.name.split(".")[0]: alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                bound |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        used = set(bound.values())
        for node in ast.walk(tree):
            match = re.match(r"\w+", ast.unparse(node)) if isinstance(node, ast.Attribute) else None
            if match and match[0] in bound:
                used.add(bound[match[0]] + ast.unparse(node)[match.end() :])
        ours = [name for name in used if name.split(".")[0] in PACKAGES and re.fullmatch(r"[\w.]+", name)]
        assert all(map(is_there, ours)), ours


def test_example_of_nnx_runs(standard_promotion):
    [script] = blocks((ROOT / "docs" / "differences.md").read_text(), "python")
    names = {}
    exec(script, names)
    assert names["tokens"].shape == (1, 4, 32)
    assert any(abs(gradient).max() > 0 for gradient in jax.tree.leaves(names["gradients"]))


# -------------------------------------------------------------------------------------------------------------------- Form


def test_readme_has_at_most_150_lines():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_page_begins_with_whom_it_is_for(page):
    title, first, *_ = page.read_text().split("\n\n")
    assert title.startswith("# ") and first.startswith("For people who ")
    assert f"docs/{page.name}" in (ROOT / "README.md").read_text()


@pages
def test_tables_are_tables(page):
    for table in re.findall(r"(?:^\|.*\n)+", prose(page.read_text()), re.MULTILINE):
        columns = {line.replace("\\|", "").count("|") for line in table.splitlines()}
        assert len(columns) == 1 and re.fullmatch(r"[|\s:-]+", table.splitlines()[1]), table
