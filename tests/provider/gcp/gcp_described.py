"""Google's published descriptions of its APIs, as a judge of requests and of answers.

They come with the client library. A request is taken apart by the description alone, so a path, a parameter, a type, an
enumeration or a field that is not in it is found out, and so is an answer of the stand-in that Google would not give in this
form.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any
from urllib.parse import unquote

__all__ = ["Asked", "Violation", "described"]

_INTEGERS = {"int64", "uint64"}


class Violation(AssertionError):
    """Not as described."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that is as described."""

    method: str
    given: dict[str, Any]
    body: Any


@dataclass(frozen=True, slots=True)
class _Method:
    id: str
    verb: str
    path: re.Pattern[str]
    names: tuple[str, ...]
    document: dict[str, Any]


class Described:
    def __init__(self, api: str, version: str) -> None:
        name = f"{api}.{version}.json"
        text = files("googleapiclient.discovery_cache").joinpath("documents", name).read_text()
        self.document: dict[str, Any] = json.loads(text)
        self._schemas = self.document["schemas"]
        self._methods = list(_methods(self.document, ""))

    def read(self, verb: str, path: str, query: dict[str, str], body: Any) -> Asked:
        """Violation for what the description does not know, or knows otherwise."""
        wrong = Violation(f"there is no {verb} {path}")
        for method in self._methods:
            found = method.path.fullmatch(path) if method.verb == verb else None
            if found is not None:
                given = dict(zip(method.names, (unquote(each) for each in found.groups()), strict=True))
                try:
                    return self._checked(method, given, query, body)
                except Violation as violation:
                    # Several methods may have paths of this form, and tell them apart by a parameter's pattern.
                    wrong = violation
        raise wrong

    def check_answer(self, method_id: str, answer: Any) -> None:
        document = next(method.document for method in self._methods if method.id == method_id)
        if "response" in document:
            self._check(document["response"], answer, method_id, asking=False)

    def _checked(self, method: _Method, given: dict[str, Any], query: dict[str, str], body: Any) -> Asked:
        described = method.document.get("parameters", {})
        common = self.document["parameters"]
        for name, value in (given | query).items():
            what = described.get(name) or (common.get(name) if name in query else None)
            if what is None:
                raise Violation(f"{method.id} has no parameter {name}")
            if name in described and what["location"] != ("path" if name in given else "query"):
                raise Violation(f"{method.id}: {name} belongs into the {what['location']}")
            _check_text(what, value, f"{method.id}: {name}")
        if missing := [name for name, what in described.items() if what.get("required") and name not in given | query]:
            raise Violation(f"{method.id} needs {missing}")
        if ("request" in method.document) != (body is not None):
            raise Violation(f"{method.id} with{'out' if body is None else ''} a body")
        if body is not None:
            self._check(method.document["request"], body, method.id, asking=True)
        return Asked(method.id, given | query, body)

    def _check(self, schema: dict[str, Any], value: Any, at: str, *, asking: bool) -> None:
        if "$ref" in schema:
            self._check(self._schemas[schema["$ref"]], value, at, asking=asking)
            return
        if asking and (schema.get("readOnly") or schema.get("description", "").startswith("[Output Only]")):
            raise Violation(f"{at} is told by Google, not to Google")
        kind = schema["type"]
        if kind == "object":
            self._check_object(schema, value, at, asking=asking)
        elif kind == "array":
            _demand(isinstance(value, list), at, value, "a list")
            for index, each in enumerate(value):
                self._check(schema["items"], each, f"{at}[{index}]", asking=asking)
        elif kind == "boolean":
            _demand(isinstance(value, bool), at, value, "true or false")
        elif kind == "integer":
            _demand(isinstance(value, int) and not isinstance(value, bool), at, value, "a whole number")
        elif kind == "number":
            _demand(isinstance(value, int | float) and not isinstance(value, bool), at, value, "a number")
        elif kind == "string":
            _demand(isinstance(value, str), at, value, "a string")
            _check_text(schema, value, at)
        else:
            _demand(kind == "any", at, value, f"of a known type, not {kind}")

    def _check_object(self, schema: dict[str, Any], value: Any, at: str, *, asking: bool) -> None:
        _demand(isinstance(value, dict), at, value, "an object")
        known = schema.get("properties", {})
        for name, each in value.items():
            described = known.get(name) or schema.get("additionalProperties")
            if described is None:
                raise Violation(f"{at} has no field {name}")
            self._check(described, each, f"{at}.{name}", asking=asking)


@cache
def described(api: str, version: str) -> Described:
    return Described(api, version)


def _methods(document: dict[str, Any], base: str) -> Any:
    for resource in document.get("resources", {}).values():
        yield from _methods(resource, base)
    for method in document.get("methods", {}).values():
        names = re.findall(r"{\+?(\w+)}", method["path"])
        parts = re.split(r"({\+?\w+})", method["path"])
        pattern = "".join(
            re.escape(part) if not part.startswith("{") else "(.+)" if part.startswith("{+") else "([^/:]+)"
            for part in parts
        )
        yield _Method(method["id"], method["httpMethod"], re.compile(pattern), tuple(names), method)


def _check_text(schema: dict[str, Any], text: str, at: str) -> None:
    if "enum" in schema and text not in schema["enum"]:
        raise Violation(f"{at}: {text!r} is none of {schema['enum']}")
    if "pattern" in schema and not re.fullmatch(schema["pattern"], text):
        raise Violation(f"{at}: {text!r} does not match {schema['pattern']}")
    if schema.get("format") in _INTEGERS or schema.get("type") == "integer":
        _demand(re.fullmatch(r"-?\d+", text) is not None, at, text, "a whole number")


def _demand(is_so: bool, at: str, value: Any, what: str) -> None:
    if not is_so:
        raise Violation(f"{at} is {value!r}, and must be {what}")
