"""Passwords and keys in URLs. URLs are written into manifests and configs and shown in messages, so none may hold one.

s3://KEY:SECRET@bucket/stores           refused; shown as s3://***@bucket/stores
https://host/file?sig=SECRET            refused; shown as https://host/file?sig=***
abfss://container@account/x, hdfs://user@host/x, http://host:8080/x     hold no secret
"""

from __future__ import annotations

import re

from elastic_rec.feature_store.utils.errors import DataError

# `user:password@`. A password may hold a slash. Digits before a slash are a port. Over HTTP a user alone is a token.
_LOGIN = re.compile(r"(?<=://)[^/@\s'\"]*:(?!\d+[/?#])[^@\s'\"]+(?=@)|(?<=http://|ttps://)[^/@\s'\"]+(?=@)", re.I)
_NAMES = r"secret|token|passwd|password|pwd|signature|credential|api_?key|access_?key|account_?key|key_?id"
_PARAMETER = re.compile(rf"([?&](?:[\w.-]*(?:{_NAMES})[\w.-]*|sig)=)[^&#\s'\"]+", re.I)


def mask_credentials(text: str) -> str:
    """`text` with *** for each password, key or token of the URLs in it."""
    return _PARAMETER.sub(r"\1***", _LOGIN.sub("***", text)) if "://" in text else text


def refuse_credentials(text: str, *, key: str = "") -> None:
    """Raises DataError where a URL in `text` holds a password, a key or a token. key: name of the setting, to show."""
    shown = mask_credentials(text)
    if shown != text:
        raise DataError(
            f"{key + '=' if key else ''}{shown}: a password or key in a URL would be written down and shown; give it "
            "by the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ...) or in the client's own files"
        )
