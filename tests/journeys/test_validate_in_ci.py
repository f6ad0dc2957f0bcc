"""`lorahub validate` where it runs every day: reports, waivers, hooks, actions, jobs."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import yaml

from lora_hub.cli.main import run
from tests.builders import sign_package, tiny_adapter, tiny_base, tiny_package
from tests.packages import package

ROOT = Path(__file__).parents[2]
SCRIPTS = sysconfig.get_path("scripts")


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A user's repository: one adapter with a warning, one package with an error."""
    folder = tmp_path / "repository"
    tiny_adapter(folder / "adapters" / "prose", base_name=None)
    package(folder / "adapters" / "verse")
    (folder / "adapters" / "verse" / "extra.py").touch()
    monkeypatch.chdir(folder)
    return folder


# ── the command ──────────────────────────────────────────────────────────────────────


def test_output_of_peft_as_it_is_becomes_a_package(tmp_path, capsys):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = tiny_base(tmp_path / "home" / "base")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(
            task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False
        ),
    )
    src = tmp_path / "adapter"
    model.save_pretrained(src, save_embedding_layers=False)

    before = run(["validate", str(src), "--format", "json", "--fail-on", "warning"])
    found = json.loads(capsys.readouterr().out)["findings"]
    fixed = run(["validate", str(src), "--fix"])
    said = capsys.readouterr()
    names = ["--name", "me/prose", "--version", "1.0.0", "--license", "MIT"]
    places = ["--base", str(base), "--out", str(tmp_path / "package")]
    packed = run(["pack", str(src), *names, *places, "--task", "text-generation"])
    capsys.readouterr()
    after = run(["validate", str(tmp_path / "package")])

    assert (before, fixed, packed, after) == (1, 0, 0, 0)
    assert [(one["rule"], one["message"]) for one in found] == [
        ("LH024", "the base is named by a local path")
    ]
    assert "removed the base's name, which is a local path" in said.err
    assert "removed keys at PEFT's defaults: " in said.err
    assert said.out.endswith("1 warning\n")
    assert str(tmp_path) not in (tmp_path / "package/adapter_config.json").read_text()
    assert capsys.readouterr().out.endswith("\n1 warning\n")  # it is not signed yet


def test_fix_leaves_signed_packages_as_they_are(tmp_path, capsys):
    folder = sign_package(tiny_package(tmp_path / "verse"), _private_key())
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    code = run(["validate", str(folder), "--fix"])

    assert code == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert capsys.readouterr().err == ""


def test_all_formats_tell_of_the_same_findings(repository, capsys):
    outputs = {}
    for form in ("text", "json", "sarif", "junit", "github"):
        assert run(["validate", "adapters", "--format", form]) == 1
        outputs[form] = capsys.readouterr().out

    rules = [one["rule"] for one in json.loads(outputs["json"])["findings"]]
    assert rules[:2] == ["LH024", "LH012"]
    (sarif,) = json.loads(outputs["sarif"])["runs"]
    assert [one["ruleId"] for one in sarif["results"]] == rules
    cases = ET.fromstring(outputs["junit"]).iter("testcase")
    assert [case.attrib["name"].split()[0] for case in cases] == rules
    assert [line.split()[1] for line in outputs["text"].splitlines()[:-1:2]] == rules
    assert [
        line.partition("title=")[2][:5] for line in outputs["github"].splitlines()[:-1]
    ] == rules


def waive(file, where):
    file.write_text(
        f'[[waiver]]\nrule = "LH012"\nwhere = "{where}"\nreason = "a sample"\n'
        "until = 9999-12-31\n"
    )


def test_waivers_of_the_repository_are_found_and_let_the_run_pass(repository, capsys):
    waive(repository / "lorahub-waivers.toml", "adapters/verse/*.py")

    passed = run(["validate", "adapters", "--format", "json"])
    findings = json.loads(capsys.readouterr().out)["findings"]
    elsewhere = run(["validate", "adapters", "--waivers", "none.toml"])

    assert passed == 0
    assert {one["rule"]: one["waived"] for one in findings if one["waived"]} == {
        "LH012": "a sample"
    }
    assert elsewhere == 2


@pytest.mark.parametrize(
    "folder", ["", "adapters", "adapters/verse"], ids=["given", "above", "itself"]
)
def test_waivers_that_came_with_what_is_checked_waive_nothing(folder, repository, capsys):
    waive(repository / folder / "lorahub-waivers.toml", "*")

    code = run(["validate", ".", "--format", "json"])

    findings = json.loads(capsys.readouterr().out)["findings"]
    (told,) = (one for one in findings if one["rule"] == "LH065")
    assert code == 1
    assert told["where"] == str(Path(folder) / "lorahub-waivers.toml")
    assert [one["rule"] for one in findings if one["waived"]] == []


def test_user_who_stands_in_the_adapter_believes_none_of_its_waivers(
    repository, capsys, monkeypatch
):
    waive(repository / "adapters/verse/lorahub-waivers.toml", "*")
    monkeypatch.chdir(repository / "adapters/verse")

    codes = [run(["validate", path]) for path in (".", "lorahub.json", "../verse")]
    trusted = run(["validate", "--waivers", "lorahub-waivers.toml", "."])

    assert codes == [1, 1, 1]
    assert trusted == 0
    assert "waived error LH012" in capsys.readouterr().out


def test_ci_believes_the_waivers_of_its_own_repository(repository):
    waive(repository / "lorahub-waivers.toml", "adapters/verse/*.py")
    job = yaml.safe_load((ROOT / "ci-templates/gitlab.yml").read_text())[
        ".lorahub-validate"
    ]
    script, env = action_steps()["Validate"]

    action = bash(script, cwd=repository, **env)
    gitlab = bash("\n".join(job["script"]), cwd=repository, **job["variables"])

    assert (action.returncode, gitlab.returncode) == (0, 0), action.stdout + gitlab.stderr
    assert "waived LH012" in action.stdout
    assert "waived error LH012" in gitlab.stdout


def _private_key():
    from lora_hub.signing import keys

    return keys.generate()


# ── other people's machines ──────────────────────────────────────────────────────────


def bash(script, *, cwd, **variables):
    """Run a step as runners do: bash, stopped by the first failure."""
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}",
            **variables,
        },
    )


def action_steps(**given):
    """Return the steps of action.yml: name → script, variables with these inputs."""
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    inputs = {name: row["default"] for name, row in action["inputs"].items()} | given
    assert action["runs"]["using"] == "composite"
    steps = {}
    for step in action["runs"]["steps"]:
        assert step["shell"] == "bash"
        assert "${{" not in step["run"]  # an input pasted into a script is a command
        env = {
            name: inputs.get(value.removeprefix("${{ inputs.").removesuffix(" }}"), value)
            for name, value in step["env"].items()
        }
        steps[step["name"]] = (step["run"], env)
    return steps


def test_action_annotates_fails_and_writes_sarif(repository):
    steps = action_steps(paths="adapters/prose\nadapters/verse\n", sarif="out file.sarif")

    written, validated = (
        bash(script, cwd=repository, **env)
        for script, env in (steps["Write SARIF"], steps["Validate"])
    )

    assert written.returncode == 0, written.stderr
    (one,) = json.loads((repository / "out file.sarif").read_text())["runs"]
    assert "LH012" in [result["ruleId"] for result in one["results"]]
    assert validated.returncode == 1
    assert (
        "::warning file=adapters/prose/adapter_config.json,title=LH024" in validated.stdout
    )
    assert "::error file=adapters/verse/extra.py,title=LH012" in validated.stdout


def test_action_passes_its_inputs_on_and_runs_none_of_them(repository):
    (repository / "my waivers.toml").write_text("")
    steps = action_steps(
        **{
            "paths": "adapters/prose",
            "fail-on": "warning",
            "waivers": "my waivers.toml",
        }
    )
    hostile = action_steps(paths="adapters/prose; touch hacked\n$(touch hacked)\n--fix")

    script, env = steps["Validate"]
    failed = bash(script, cwd=repository, **env)
    script, env = hostile["Validate"]
    refused = bash(script, cwd=repository, **env)

    assert failed.returncode == 1
    assert failed.stdout.count("::warning") == 1
    assert refused.returncode == 2
    assert not (repository / "hacked").exists()


def test_action_does_not_hide_an_error_of_the_command(repository):
    script, env = action_steps(paths="nothing", sarif="x")["Write SARIF"]

    assert bash(script, cwd=repository, **env).returncode == 2


def test_gitlab_job_writes_its_report_and_decides(repository):
    (name, job), *others = yaml.safe_load(
        (ROOT / "ci-templates" / "gitlab.yml").read_text()
    ).items()

    variables = {**job["variables"], "LORAHUB_PATHS": "adapters"}
    result = bash("\n".join(job["script"]), cwd=repository, **variables)

    assert (name, others) == (".lorahub-validate", [])
    assert result.returncode == 1
    assert "error LH012 adapters/verse/extra.py" in result.stdout
    report = ET.parse(repository / job["artifacts"]["reports"]["junit"]).getroot()
    assert report.attrib["failures"] != "0"


def test_hook_entry_is_our_command_and_its_files_are_adapters():
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())

    assert hook["entry"] == "lorahub validate"
    assert hook["language"] == "python"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_pre_commit_installs_and_runs_the_hook_and_the_action_installs(tmp_path):
    """All comes from PyPI into temporary environments; without a network it is skipped."""
    tools = tmp_path / "tools"
    subprocess.run([sys.executable, "-m", "venv", str(tools)], check=True)
    pip = [str(tools / "bin/python"), "-m", "pip", "install", "--quiet"]
    installed = subprocess.run(
        [*pip, "pre-commit", "check-jsonschema"], capture_output=True, text=True
    )
    if installed.returncode:
        pytest.skip(f"pre-commit cannot be installed: {installed.stderr[-200:]}")
    ours = _git_copy(tmp_path / "lora-hub")
    user = tmp_path / "user"
    tiny_adapter(user / "good")
    tiny_adapter(user / "bad" / "one")
    (user / "bad" / "one" / "adapter_model.safetensors").write_bytes(b"ab")
    (user / "notes.txt").write_text("not ours")
    (user / ".pre-commit-config.yaml").write_text(
        yaml.safe_dump(
            {
                "repos": [
                    {
                        "repo": str(ours),
                        "rev": _head(ours),
                        "hooks": [{"id": "lorahub-validate"}],
                    }
                ]
            }
        )
    )
    _commit_all(user)
    environment = {**os.environ, "PRE_COMMIT_HOME": str(tmp_path / "pre-commit")}

    def hook(*files):
        return subprocess.run(
            [str(tools / "bin/pre-commit"), "run", "--files", *files],
            cwd=user,
            env=environment,
            capture_output=True,
            text=True,
        )

    good = hook("good/adapter_config.json", "good/adapter_model.safetensors", "notes.txt")
    bad = hook("bad/one/adapter_model.safetensors")
    none = hook("notes.txt")
    script, _ = action_steps()["Install lorahub"]
    action = bash(
        script,
        cwd=user,
        ACTION_PATH=str(ours),
        RUNNER_TEMP=str(tmp_path),
        GITHUB_PATH=str(tmp_path / "path"),
    )
    folder = (tmp_path / "path").read_text().strip()
    version = subprocess.run(
        [f"{folder}/lorahub", "validate", "good"], cwd=user, capture_output=True, text=True
    )
    schemas = [
        subprocess.run(
            [
                str(tools / "bin/check-jsonschema"),
                *("--builtin-schema", schema, str(ROOT / file)),
            ],
            capture_output=True,
            text=True,
        )
        for schema, file in (
            ("vendor.github-actions", "action.yml"),
            ("vendor.gitlab-ci", "ci-templates/gitlab.yml"),
        )
    ]

    assert good.returncode == 0, good.stdout + good.stderr
    assert "Passed" in good.stdout
    assert bad.returncode == 1
    assert "error LH020 bad/one/adapter_model.safetensors" in bad.stdout
    assert "Skipped" in none.stdout
    assert action.returncode == 0, action.stderr
    assert version.stdout == "no findings\n", version.stderr
    assert [one.returncode for one in schemas] == [0, 0], [one.stdout for one in schemas]


def _git_copy(folder):
    """Return a repository that holds what an installation of ours needs, committed."""
    shutil.copytree(
        ROOT / "lora_hub", folder / "lora_hub", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE", ".pre-commit-hooks.yaml"):
        shutil.copy(ROOT / name, folder / name)
    _commit_all(folder)
    return folder


def _commit_all(folder):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "all"]):
        _git(folder, *identity, *command)


def _head(folder):
    return _git(folder, "rev-parse", "HEAD").strip()


def _git(folder, *arguments):
    # The user's own settings (hooks, signing) are none of the test's.
    environment = {
        **os.environ,
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_SYSTEM": os.devnull,
    }
    return subprocess.run(
        ["git", *arguments],
        cwd=folder,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
