"""What holds for every test: no network, and no progress bars in the output."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import hypothesis
import pytest
from jaxtyping import install_import_hook

import tests.typecheck  # noqa: F401  (named below)

# Shapes and dtypes in the tensor half's annotations are checked while tests run.
install_import_hook(
    [f"lora_hub.{part}" for part in ("adapter", "composing", "merging", "runtime")],
    "tests.typecheck.checked",
)


# Tests assert no times: a machine under load is no failure.
hypothesis.settings.register_profile(
    "patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("patient")


@pytest.fixture(autouse=True)
def own_home(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Give every test a home and a cache of its own: no pin or key of the user's counts."""
    folder = tmp_path_factory.mktemp("user")
    monkeypatch.setenv("LORAHUB_HOME", str(folder / "home"))
    monkeypatch.setenv("LORAHUB_CACHE", str(folder / "cache"))
    for variable in ("LORAHUB_REGISTRY", "LORAHUB_TRUST", "SOURCE_DATE_EPOCH"):
        monkeypatch.delenv(variable, raising=False)
