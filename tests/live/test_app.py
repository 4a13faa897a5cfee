"""The routes of the live page: its files need nothing from elsewhere, and its facts are for who may use the model."""

from __future__ import annotations

import re

import pytest
from starlette.exceptions import HTTPException

from resplit.api_keys import digest
from resplit.gateway.openai.api_keys import ApiKeys
from resplit.live.app import page_files, reader_check

FILES = {name: content.decode() for name, content in page_files().items()}


def test_without_required_keys_everybody_may_read() -> None:
    check = reader_check(ApiKeys({}, required=False), "token")
    check("")
    check("Bearer anything")


@pytest.mark.parametrize("given", ["Bearer key", "Bearer token"])
def test_with_keys_a_key_or_the_control_token_may_read(given: str) -> None:
    reader_check(ApiKeys({digest("key"): "chat"}, required=True), "token")(given)


@pytest.mark.parametrize("given", ["", "Bearer", "Bearer guessed", "token", "Bearer töken"])
def test_with_keys_others_may_not_read(given: str) -> None:
    with pytest.raises(HTTPException) as refused:
        reader_check(ApiKeys({digest("key"): "chat"}, required=True), "token")(given)
    assert refused.value.status_code == 401


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_file_loads_nothing_from_elsewhere(name: str) -> None:
    addresses = re.findall(r"""(?:src|href|url|from|import)\s*[=(]?\s*["'](.*?)["']""", FILES[name])
    outside = [each for each in addresses if re.match(r"\w+:|//", each)]
    assert not outside


@pytest.mark.parametrize("name", sorted(name for name in FILES if name.endswith(".js")))
def test_text_from_the_cluster_never_becomes_markup(name: str) -> None:
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", FILES[name])


@pytest.mark.parametrize("name", sorted(name for name in FILES if name.endswith(".js")))
def test_imported_files_and_elements_exist(name: str) -> None:
    imported = re.findall(r'from "\./([\w.]+)"', FILES[name])
    assert set(imported) <= set(FILES)
    wanted = set(re.findall(r'\bfind\("([\w-]+)"\)', FILES[name]))
    assert wanted <= set(re.findall(r'id="([\w-]+)"', FILES["index.html"]))
