"""What is compared: a selector with its settings, and p; written `name:budget:p:field=value,...`, say `quest:n/4:.95`."""

from __future__ import annotations

import dataclasses
import re
import typing
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from .. import selectors
from ..config import TwilightConfig
from ..selectors import Selector
from .aggregation import ExactTopK
from .ceiling import ExactTopP

ALL_LAYERS = 1 << 20  # of any model
_DECIMAL = re.compile(r"\d*\.\d+")  # p: budgets are whole numbers
# Fields of TwilightConfig that a method may set beside those of its selector.
CONFIG_FIELDS = {
    "page_size": int,
    "dense_layers": int,
    "dense_below": int,
    "sink_tokens": int,
    "recent_tokens": int,
    "calibration": str,
    "kv_cache_dtype": str,
}


@dataclass(frozen=True)
class Method:
    """One row of the results: a selector (None: dense), p, and configuration fields that differ from the defaults."""

    selector: Selector | None
    top_p: float = 1.0
    settings: tuple[tuple[str, int | str], ...] = ()

    @property
    def name(self) -> str:
        return "dense" if self.selector is None else self.selector.name

    @property
    def label(self) -> str:
        """The specification that gives this method again, without p: fields at their defaults are left out."""
        return ":".join(part for part in (self.name, self._budget, self._fields) if part)

    @property
    def setting(self) -> str:
        """The whole specification, p included: what a row of a speed table is looked up by."""
        if self.selector is None:
            return self.label
        top_p = f"{self.top_p:g}"
        return ":".join(part for part in (self.name, self._budget, top_p if "." in top_p else f"{top_p}.0", self._fields) if part)

    @property
    def _budget(self) -> str:
        """`n/8`, `8192`, or nothing where the budget is the default or needs both fields."""
        if self.selector is None:
            return ""
        tokens, share = self.selector.token_budget, self.selector.budget_fraction
        if (tokens, share) == (type(self.selector).token_budget, type(self.selector).budget_fraction):
            return ""
        if share == 0.0:
            return str(tokens)
        parts = Fraction(share).limit_denominator(1024)
        return f"n/{parts.denominator}" if tokens == 1 and parts.numerator == 1 and float(parts) == share else ""

    @property
    def _fields(self) -> str:
        told = ("token_budget", "budget_fraction") if self._budget else ()
        fields = [
            (f.name, getattr(self.selector, f.name))
            for f in (dataclasses.fields(self.selector) if self.selector is not None else ())
            if f.name not in told and getattr(self.selector, f.name) != f.default
        ]
        return ",".join(f"{name}={_format(value)}" for name, value in [*fields, *self.settings])

    @property
    def key(self) -> str:
        return self.label if self.selector is None else f"{self.label} p={self.top_p:g}"

    def config(self) -> TwilightConfig:
        """Every length is sparse (dense_below 0), so that short contexts show the method too."""
        if self.selector is None:
            return TwilightConfig(dense_layers=ALL_LAYERS, top_p=1.0, **dict(self.settings))
        return TwilightConfig(selector=self.selector, top_p=self.top_p, **{"dense_below": 0, **dict(self.settings)})

    def check_files(self, where: str) -> None:
        """ValueError for a calibration file that is not there, before a model is loaded for it."""
        path = getattr(self.selector, "calibration", None) or self.config().calibration
        if path is not None and not Path(path).is_file():
            raise ValueError(f"{where}: {self.name}: calibration: expected a file of `python -m twilight_ops calibrate`, got {path}")

    def with_top_p(self, top_p: float) -> Method:
        return dataclasses.replace(self, top_p=top_p)

    def with_tokens(self, tokens: int) -> Method:
        """The selector alone with a fixed budget."""
        selector = dataclasses.replace(self.selector, token_budget=max(1, tokens), budget_fraction=0.0)
        return dataclasses.replace(self, selector=selector, top_p=1.0)


DENSE = Method(None)


def _format(value) -> str:
    return "+".join(map(str, value)) if isinstance(value, tuple) else f"{value:g}" if isinstance(value, float) else str(value)


def selector_classes() -> dict[str, type[Selector]]:
    """Every selector by its name, those of the ablations among them."""
    found = [*(getattr(selectors, name) for name in selectors.__all__), ExactTopK, ExactTopP]
    return {cls.name: cls for cls in found if isinstance(cls, type) and issubclass(cls, Selector) and cls.name}


def parse_method(text: str, where: str = "methods") -> Method:
    """`quest:n/4:.95:sink_tokens=0` -> Method.

    After the name, in any order: a budget, `n/4` of the context or `8192` tokens; p, a decimal such as `.95`; and fields by name,
    `field=value,...`. What is left out is the selector's default, and p is 1: no pruner.

    Raises:
        ValueError: what was expected, beginning with `where`.
    """
    name, *sections = text.strip().split(":")
    classes = selector_classes()
    if name != "dense" and name not in classes:
        raise ValueError(f"{where}: expected one of dense, {', '.join(classes)}, got {name!r}")
    if name == "dense":
        # What dense attention depends on is how K and V are stored.
        if sections not in ([], ["kv_cache_dtype=fp8"]):
            raise ValueError(f"{where}: expected dense or dense:kv_cache_dtype=fp8, got {text!r}")
        return Method(None, settings=(("kv_cache_dtype", "fp8"),)) if sections else DENSE
    parts, top_p = [], None
    for section in sections:
        if section.startswith("n/"):
            parts += ["token_budget=1", f"budget_fraction=1/{section[2:]}"]
        elif section.isdecimal():
            parts += [f"token_budget={section}", "budget_fraction=0"]
        elif _DECIMAL.fullmatch(section):
            if top_p is not None or not 0.0 < float(section) <= 1.0:
                raise ValueError(f"{where}: {name}: expected one p, 0 < p <= 1, got {text!r}")
            top_p = float(section)
        else:
            parts += filter(None, section.split(","))
    types = typing.get_type_hints(classes[name])
    fields = {field.name: types[field.name] for field in dataclasses.fields(classes[name])}
    chosen, config = {}, {}
    for part in parts:
        field, equals, value = part.partition("=")
        if not equals or field not in {**fields, **CONFIG_FIELDS}:
            raise ValueError(f"{where}: {name}: expected field=value with a field of {', '.join([*fields, *CONFIG_FIELDS])}, got {part!r}")
        target, kind = (chosen, fields[field]) if field in fields else (config, CONFIG_FIELDS[field])
        if field in target:
            raise ValueError(f"{where}: {name}: expected {field} once, got {part!r} again")
        target[field] = _convert(kind, value)
    try:
        method = Method(classes[name](**chosen), 1.0 if top_p is None else top_p, tuple(config.items()))
        method.config()
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return method


def has_top_p(text: str) -> bool:
    """Whether a method's text names its p, which may be 1.0."""
    return any(_DECIMAL.fullmatch(section) for section in text.split(":")[1:])


def _convert(kind, value: str):
    """The value that the text stands for, or the text itself: the record that it is for says what it expects."""
    if value == "None":
        return None
    kinds = typing.get_args(kind) or (kind,)
    try:
        if typing.get_origin(kind) is tuple:
            return tuple(int(part) for part in value.split("+"))
        if bool in kinds:
            return {"true": True, "false": False}.get(value.lower(), value)
        if float in kinds:
            return float(Fraction(value))
        return int(value) if int in kinds else value
    except (ValueError, ZeroDivisionError):
        return value


# Budgets as shares of the context, so that one list serves every length.
STANDARD = (
    "full",
    "shadow_prefix",
    "quest:n/4",
    "page_mean:n/4",
    "double_sparsity:n/4",
    "sparq:n/8:channels=16",
    "tidal:n/8",
    "streaming:n/4",
    "magicpig",
)
