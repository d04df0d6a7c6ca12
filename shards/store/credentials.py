"""What is secret: variables and URL parameters by their names, and credentials in URLs."""

import re
from urllib.parse import parse_qsl, urlsplit

SECRET = re.compile(r"secret|token|passw|credential|key|auth|\bsig\b|signature", re.IGNORECASE)


def is_secret(name: str) -> bool:
    """Whether an environment variable or a URL parameter of that name holds a secret."""
    return bool(SECRET.search(name))


def has_credentials(url: str) -> bool:
    """Whether a URL holds a password, the user of a web server, or a secret parameter."""
    parts = urlsplit(url)
    is_web_user = bool(parts.username) and parts.scheme in ("http", "https")
    return parts.password is not None or is_web_user or any(is_secret(name) for name, _ in parse_qsl(parts.query))


def without_credentials(url: str) -> str:
    """A URL without user, password and parameters, to be shown."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
