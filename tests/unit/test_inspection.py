"""``kiln inspect`` and ``kiln plan`` with models that are fakes: what is told of which versions, and what failed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from service import inspection
from service.errors import ModelLoadError
from service.registry.config import ModelConfig
from service.runtime.records import Chosen, SignatureRecord
from service.server import registry_options
from service.settings import Settings
from tests.fakes import DOUBLE, FakeModel

OWN = SignatureRecord({1: Chosen("signature", 1, 0.001)})


class Known(FakeModel):
    """A model whose plans are known from before."""

    def __init__(self) -> None:
        super().__init__({"serving_default": DOUBLE, "alias": replace(DOUBLE, name="alias")})
        self.plans = {"serving_default": OWN, "alias": replace(OWN, twin="serving_default")}
        self.planned = 0
        self.finds = True

    def plan(self, tell: Callable[[str], None] = lambda line: None) -> bool:
        self.planned += 1
        tell("serving_default: xla")
        if self.finds:
            self.is_planned = True
            self.plans["serving_default"] = replace(OWN, chosen={1: Chosen("xla", 1, 0.0001)})
        return self.finds


class New(Known):
    """A model whose plans are not known."""

    needs_planning = True
    is_planned = False


class Shop:
    """What the models of a folder are loaded from, by ``name/version``."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.models: dict[str, FakeModel | Exception] = {}
        self.configs: list[ModelConfig] = []
        self.told: list[str] = []

        def options(settings: Settings) -> Any:
            return replace(registry_options(settings), materialize=lambda source: source.path, load=self.load)

        monkeypatch.setattr(inspection, "registry_options", options)
        monkeypatch.setattr("service.server.keep_programs_in", lambda folder: None)

    def add(self, key: str, model: FakeModel | Exception) -> None:
        folder = self.root / "models" / key
        folder.mkdir(parents=True)
        (folder / "saved_model.pb").write_bytes(b"graph")
        self.models[key] = model

    def load(self, path: Path, config: ModelConfig) -> Any:
        self.configs.append(config)
        model = self.models[str(path.relative_to(self.root / "models"))]
        if isinstance(model, Exception):
            raise model
        return model

    def look(self, *, plan: bool, **settings: Any) -> list[str]:
        given = Settings(models=str(self.root / "models"), cache_dir=self.root / "cache", **settings)
        return inspection.look_at(given, tell=self.told.append, plan=plan)


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    return Shop(tmp_path, monkeypatch)


def test_known_plans_are_told(shop: Shop) -> None:
    """Each signature with its table; one that is the same function as another is told so. Nothing is planned."""
    model = Known()
    shop.add("cat/3", model)
    assert shop.look(plan=False) == []
    assert shop.told[0] == "\ncat v3 on CPU:0"
    assert shop.told[1] == f"\nserving_default: {DOUBLE.describe()}"
    assert "signature" in shop.told[2]
    assert shop.told[3:] == [f"\nalias: {DOUBLE.describe()}", "as serving_default"]
    assert (model.planned, model.closed) == (0, True)


@pytest.mark.parametrize("plan", [False, True])
def test_unknown_plans_are_found_out(shop: Shop, plan: bool) -> None:
    """By both commands, with what is going on; the table is that of the plans found."""
    shop.add("cat/1", New())
    assert shop.look(plan=plan) == []
    assert shop.told[:3] == ["cat v1: looking for its fastest plans", "serving_default: xla", "\ncat v1 on CPU:0"]
    assert "xla" in shop.told[4]


def test_planning_twice_says_so(shop: Shop) -> None:
    """A cache that is complete is no failure."""
    shop.add("cat/1", Known())
    assert shop.look(plan=True) == []
    assert shop.told[0] == "cat v1: planned before"


def test_a_model_that_has_one_plan_only_is_told(shop: Shop) -> None:
    """A stateful model, or one for which the signature plan was asked, is neither planned now nor before."""
    model = Known()
    model.is_planned = False
    shop.add("cat/1", model)
    assert shop.look(plan=True) == []
    assert (shop.told[0], model.planned) == ("\ncat v1 on CPU:0", 0)


def test_planning_that_fails_is_a_failure(shop: Shop) -> None:
    """What serves meanwhile is told all the same."""
    model = New()
    model.finds = False
    shop.add("cat/1", model)
    assert shop.look(plan=True) == ["cat v1: not planned; --log-level warning tells why"]
    assert "signature" in shop.told[-3]


def test_what_cannot_be_loaded_leaves_the_others(shop: Shop) -> None:
    """Broken models and folders that are none are failures, with their reasons."""
    shop.add("bad/1", ModelLoadError("it is damaged"))
    shop.add("cat/1", Known())
    (shop.root / "models" / "empty" / "1").mkdir(parents=True)
    failures = shop.look(plan=False)
    assert failures[-1] == "bad v1: it is damaged"
    assert failures[0].startswith("empty: ")
    assert shop.told[0] == "\ncat v1 on CPU:0"


def test_versions_are_those_that_would_be_served(shop: Shop, tmp_path: Path) -> None:
    """The policy of the config decides, and the config is what the model is loaded with."""
    for version in (1, 2, 3):
        shop.add(f"cat/{version}", Known())
    assert shop.look(plan=False) == []
    assert [line for line in shop.told if line.startswith("\ncat")] == ["\ncat v3 on CPU:0"]
    shop.told.clear()
    config = tmp_path / "config.yaml"
    config.write_text("models: {cat: {versions: [1, 2], plan: xla}}")
    assert shop.look(plan=False, models_config=config) == []
    assert [line for line in shop.told if line.startswith("\ncat")] == ["\ncat v1 on CPU:0", "\ncat v2 on CPU:0"]
    assert [c.plan for c in shop.configs] == [None, "xla", "xla"]
