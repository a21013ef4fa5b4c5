"""No password, key or token of a URL is written down or shown."""

from __future__ import annotations

import helpers
import pytest

from elastic_rec.feature_store.ingestion.inputs import find_inputs
from elastic_rec.feature_store.table.location import open_location
from elastic_rec.feature_store.utils.credentials import mask_credentials
from elastic_rec.feature_store.utils.errors import DataError

SECRETS = {
    "s3://AKIA1:sec/ret+x@bucket/stores/a": "s3://***@bucket/stores/a",
    "s3://:sec/ret@bucket": "s3://***@bucket",
    "http://user:pw@host:8080/x.zip": "http://***@host:8080/x.zip",
    "https://ghp_token@host/x": "https://***@host/x",
    "simplecache::s3://AKIA1:secret@bucket/x": "simplecache::s3://***@bucket/x",
    "https://host/x?sv=1&sig=abc%2B&se=2": "https://host/x?sv=1&sig=***&se=2",
    "https://host/x?X-Amz-Credential=AKIA1&X-Amz-Signature=ff": "https://host/x?X-Amz-Credential=***&X-Amz-Signature=***",
    "s3://bucket/x?region=eu&secret_key=abc": "s3://bucket/x?region=eu&secret_key=***",
}
HARMLESS = (
    "abfss://container@account.dfs.core.windows.net/x", "hdfs://alice@namenode:8020/x", "http://host:8080/a@2x.png",
    "s3://bucket/a:b@c/x?region=eu-west-1", "file:///data/a:b@c", "/data/a:b@c?token=1", "sftp://alice@host/x",
)  # fmt: skip


@pytest.mark.parametrize(("url", "shown"), SECRETS.items())
def test_a_secret_in_a_url_is_masked_and_refused(url, shown):
    assert mask_credentials(f"cannot read '{url}': gone") == f"cannot read '{shown}': gone"
    for use in (open_location, lambda url: find_inputs([f"{url}/*.parquet"], format="parquet")):
        with pytest.raises(DataError, match="password or key in a URL") as caught:
            use(url)
        assert shown in str(caught.value) and url not in str(caught.value)


@pytest.mark.parametrize("url", HARMLESS)
def test_a_url_without_a_secret_stays(url):
    assert mask_credentials(url) == url


@pytest.mark.parametrize("key", ["data.ingest.input.0", "data.store", "data.impressions.item_input"])
def test_a_verb_refuses_it_in_any_setting_and_writes_nothing(key, tmp_path):
    given = (
        key.replace(".input.0", ".input=[s3://AKIA1:HUSH@b/e.csv]") if key.endswith("0") else f"{key}=s3://AKIA1:HUSH@b"
    )
    code, text = helpers.fail("ingest", "data=files", f"data.store={tmp_path}/s", given)
    assert code == 2 and f"{key}=s3://***@b" in text and "HUSH" not in text
    assert not list(tmp_path.iterdir())
