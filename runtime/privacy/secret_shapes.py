"""What secrets look like: a table of shapes that say of themselves what they are.

A library was refused: detect-secrets looks at lines, so that of a private key it finds the first line and leaves the
key, and it guesses by entropy, which takes ids for secrets. Not covered: secrets without a shape, such as a password in
a sentence.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shape:
    """One kind of secret."""

    name: str
    """Stands in the placeholder."""
    hints: tuple[str, ...]
    """A text without any of them, upper and lower case alike, holds none: finding that out costs next to nothing."""
    pattern: re.Pattern[str]
    """Its group `secret`, or all of it, is replaced."""


def _shape(name: str, hints: str, pattern: str) -> Shape:
    return Shape(name, tuple(hints.split()), re.compile(pattern))


_START = r"(?<![A-Za-z0-9])"
_PEM = r"(?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----"

SHAPES = (
    # A key without its end (a tool cut it) goes up to the next line of dashes.
    _shape("private-key", "-----begin", rf"-----BEGIN {_PEM}[^-]*+(?:-(?!----)[^-]*+)*+(?:-----END {_PEM})?"),
    _shape("password", "://", r"://[^\s/:@\"'<>\\]{0,256}:(?P<secret>[^\s/\"'<>\\]{1,256})@"),
    _shape("jwt", "eyj", rf"{_START}eyJ[\w-]{{8,}}\.eyJ[\w-]{{8,}}\.[\w-]*"),
    _shape("aws-key-id", "akia asia abia acca", rf"{_START}(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{{16}}(?![A-Za-z0-9])"),
    _shape(
        "aws-secret-key",
        "aws",
        r"(?i:aws_?(?:secret_?)?(?:access_?)?(?:secret|key|token))\\?[\"']?\s{0,8}[:=]\s{0,8}\\?[\"']?"
        r"(?P<secret>[A-Za-z0-9/+=]{40,})",
    ),
    _shape("api-key", "sk-", rf"{_START}sk-(?=[\w-]{{0,40}}[0-9])[\w-]{{20,}}"),
    _shape("api-key", "sa_", rf"{_START}sa_[\w-]{{40,}}"),
    _shape("api-key", "sk_ rk_ pk_", rf"{_START}[srp]k_(?:live|test)_[A-Za-z0-9]{{16,}}"),
    _shape("github-token", "ghp_ gho_ ghu_ ghs_ ghr_", rf"{_START}gh[pousr]_[A-Za-z0-9]{{30,}}"),
    _shape("github-token", "github_pat_", rf"{_START}github_pat_\w{{22,}}"),
    _shape("gitlab-token", "glpat-", rf"{_START}glpat-[\w-]{{20,}}"),
    _shape("slack-token", "xox", rf"{_START}xox[abeoprs](?:\.xox[bp])?-[A-Za-z0-9-]{{10,}}"),
    _shape("slack-webhook", "hooks.slack.com", r"hooks\.slack\.com/(?:services|workflows)/(?P<secret>[\w/-]{20,})"),
    _shape("google-key", "aiza", rf"{_START}AIza[\w-]{{35}}"),
    _shape("google-token", "ya29.", rf"{_START}ya29\.[\w-]{{20,}}"),
    _shape("huggingface-token", "hf_", rf"{_START}hf_[A-Za-z0-9]{{30,}}"),
    _shape("npm-token", "npm_", rf"{_START}npm_[A-Za-z0-9]{{36}}"),
    _shape("pypi-token", "pypi-", rf"{_START}pypi-[\w-]{{50,}}"),
    _shape("sendgrid-key", "sg.", rf"{_START}SG\.[\w-]{{16,}}\.[\w-]{{16,}}"),
    _shape("digitalocean-token", "dop_v1_ doo_v1_ dor_v1_", rf"{_START}do[por]_v1_[a-f0-9]{{64}}"),
    _shape("telegram-token", ":aa", r"(?<![0-9])[0-9]{8,10}:AA[\w-]{33}"),
    _shape("azure-key", "accountkey=", r"(?i:AccountKey=)(?P<secret>[A-Za-z0-9+/=]{40,})"),
    _shape("bearer-token", "bearer", r"(?i:bearer)\s{1,8}(?P<secret>(?=[\w.~+/-]{0,200}[0-9])[\w.~+/-]{16,}=*)"),
    _shape(
        "authorization",
        "authorization",
        r"(?i:authorization)\\?[\"']?\s{0,8}[:=]\s{0,8}\\?[\"']?(?i:basic|token)\s{1,8}(?P<secret>[\w.~+/=-]{8,})",
    ),
    # An assignment, as in a file of settings: a value with a digit, so that prose and code are left alone.
    _shape(
        "secret",
        "password passwd secret api_key api-key apikey access_key auth_token access_token",
        r"(?i:passw(?:or)?d|secret|api[_-]?key|access[_-]?key|(?:auth|access)[_-]?token)\\?[\"']?\s{0,8}[:=]\s{0,8}"
        r"\\?[\"']?(?P<secret>(?=[^\s\"'\\]{0,100}[0-9])[^\s\"'\\,;(){}\[\]<>]{8,})",
    ),
)
"""In this order: what the first ones have replaced, the later ones do not see."""
