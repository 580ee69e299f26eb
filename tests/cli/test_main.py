"""The program as a whole: exit codes, messages and lazy imports."""

import os
import subprocess
import sys

import pytest

from fedmerge_peft import __version__
from fedmerge_peft.cli import main
from fedmerge_peft.errors import DataError
from fedmerge_peft.recipe import loading

PROGRAM = [sys.executable, "-W", "error", "-c", "from fedmerge_peft.cli import main; main()"]
VERBS = (
    *(
        "ls",
        "cp",
        "validate",
        "show",
        "schema",
        "run",
        "resume",
        "scores",
        "sweep",
        "compare",
        "data",
        "personalize",
    ),
    *("export", "init", "report", "doctor", "verify", "chat", "estimate"),
)
HEAVY = {
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "evaluate",
    "numpy",
    "pandas",
    "sklearn",
    "rich",
    "matplotlib",
}


@pytest.fixture
def fedmerge(capsys):
    """Run the program in this process; return exit code, standard output, standard error."""

    def run(*arguments):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        return (caught.value.code or 0, *capsys.readouterr())

    return run


def test_the_version_equals_the_packages(fedmerge):
    assert fedmerge("--version") == (0, f"fedmerge-peft {__version__}\n", "")


@pytest.mark.parametrize(("outside", "inside"), [(None, "passive"), ("active", "active")])
def test_idle_threads_sleep_unless_the_environment_overrides_it(
    outside, inside, fedmerge, monkeypatch
):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if outside is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", outside)
    fedmerge("--version")
    assert os.environ["OMP_WAIT_POLICY"] == inside


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_lists_the_commands(option, fedmerge):
    code, out, _ = fedmerge(option)
    assert code == 0
    assert all(f"  {verb} " in out for verb in VERBS)


def test_help_explains_the_exit_codes(fedmerge):
    help_text = " ".join(fedmerge("--help")[1].split())
    assert "Exit codes: 0 success; 1 a failed check" in help_text


@pytest.mark.parametrize("verb", VERBS)
def test_every_command_has_help_with_an_example(verb, fedmerge):
    code, out, _ = fedmerge(verb, "--help")
    assert code == 0
    assert f"Usage: fedmerge {verb}" in out
    assert f"Example: fedmerge {verb}" in out


def test_these_tests_cover_every_command():
    from fedmerge_peft.cli.app import app

    assert {
        command.name or command.callback.__name__ for command in app.registered_commands
    } == set(VERBS)


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("fedmerge rep", ["report"]),
        ("fedmerge run qui", ["quickstart"]),
        ("fedmerge validate cifar", 2),
    ],
)
def test_the_shell_completes_commands_and_recipes(typed, offered):
    words = typed.split()
    environment = {
        **os.environ,
        "_FEDMERGE_COMPLETE": "complete_bash",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(len(words) - 1),
    }
    done = subprocess.run(PROGRAM, capture_output=True, text=True, check=False, env=environment)
    found = done.stdout.split()
    assert len(found) == offered if isinstance(offered, int) else found == offered, done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("nosuchverb",),
        ("--nosuchoption",),
        ("validate",),
        ("validate", "--nosuchoption", "smoke"),
        ("ls", "too", "many"),
        ("cp", "smoke", "too", "many"),
        ("schema", "--out"),
        ("validate", "nosuchrecipe"),
        ("validate", ""),
        ("validate", "a\x00b"),
        ("validate", "."),
        ("validate", "/dev/null"),
        ("validate", "smoke", "seed"),
        ("validate", "smoke", "seed=x", "sead=3"),
        ("validate", "smoke", "name=[" * 10),
        ("show", "smoke", "strategy=*a"),
        ("show", "\x1b[31mred"),
        ("cp", "nosuchrecipe"),
        ("cp", "smoke", "no/such/folder.yaml"),
        ("cp", "smoke", "a\x00b"),
        ("schema", "--out", "no/such/folder.json"),
        ("run", "nosuchrecipe"),
        ("run", "smoke", "rounds=0"),
        ("data", "nosuchrecipe"),
    ],
    ids=" ".join,
)
def test_bad_input_ends_with_code_2_and_a_message(arguments, fedmerge):
    code, out, err = fedmerge(*arguments)
    assert code == 2
    assert out == ""
    assert err.strip()
    assert "Traceback" not in err
    assert err.replace("\n", "").isprintable()


def test_every_error_has_a_line_of_its_own(fedmerge):
    _, _, err = fedmerge("validate", "smoke", "seed=x", "rounds=0")
    assert err.splitlines() == [
        "overrides: seed: found text 'x', expected a whole number at least 0 and below "
        "9223372036854775808",
        "overrides: rounds: found 0, expected a whole number above 0 and at most 1000000",
    ]


def test_any_expected_error_is_one_message(fedmerge, monkeypatch):
    def fail(*_):
        raise DataError("no such \x1b[31mcolumn\nnext: fedmerge data")

    monkeypatch.setattr(loading, "load", fail)
    assert fedmerge("validate", "smoke") == (
        2,
        "",
        "no such \\x1b[31mcolumn\nnext: fedmerge data\n",
    )


def test_developers_can_enable_tracebacks(monkeypatch):
    monkeypatch.setenv("FEDMERGE_TRACEBACK", "1")
    with pytest.raises(loading.RecipeError):
        main(["validate", "nosuchrecipe"])


def test_an_interrupt_ends_with_code_130(fedmerge, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(loading, "load", interrupt)
    assert fedmerge("validate", "smoke") == (130, "", "")


def test_a_bug_keeps_its_traceback(monkeypatch):
    def fail(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(loading, "load", fail)
    with pytest.raises(ZeroDivisionError):
        main(["validate", "smoke"])


def test_the_installed_program_reports_errors_without_a_traceback():
    done = subprocess.run(
        [*PROGRAM, "validate", "smoke", "seed=x"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "overrides: seed: found text 'x', expected a whole number at least 0 and below "
        "9223372036854775808\n"
    )


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (
            ["validate", b"smoke", b"name=\xff"],
            2,
            b"overrides: found 'name=\\udcff', expected key=value",
        ),
        (["validate", "smoke", "name=für"], 0, b"f\\xfcr is valid: "),
        (["show", "smoke", "name=für"], 0, "name: für\n".encode()),
    ],
    ids=["undecodable", "validate", "show"],
)
def test_terminals_without_unicode_show_escapes_and_files_are_utf_8(arguments, code, text):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*PROGRAM, *arguments], capture_output=True, check=False, env=environment)
    assert done.returncode == code
    assert (done.stdout + done.stderr).startswith(text)


@pytest.mark.parametrize("arguments", [["show", "smoke"], ["schema"], ["--help"]], ids=" ".join)
def test_a_closed_pipe_ends_the_program_quietly(arguments):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*PROGRAM, *arguments], stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert done.stderr == b""
    assert done.returncode == 1


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["ls"], ["validate", "smoke"], ["show", "smoke"], ["schema"]],
    ids=" ".join,
)
def test_recipe_commands_import_no_torch(arguments):
    script = (
        "import sys\nfrom fedmerge_peft.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    assert not end.code\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True
    )
    assert not HEAVY & set(done.stderr.split())
