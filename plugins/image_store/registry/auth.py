"""Authorization at one registry: Basic, or bearer tokens from the server that it names.

Distribution's token specifications (docs/spec/auth/token.md, oauth.md), RFC 7617, RFC 6750.
A login is sent to the registry that it is for and to the token server which that registry
names, over TLS; plainly only where the registry itself may be spoken to plainly. The scope
asked for is ours, never the one that the registry proposes: a pull gets no right to push.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import urlencode

import httpx
import msgspec
import trio

from plugins.image_store.registry.challenge import Challenge, parse_challenges
from plugins.image_store.registry.credentials import Credentials, Login
from plugins.image_store.registry.exchange import Answer, Exchange
from plugins.image_store.registry.patience import Passing, retry_after_s
from plugins.image_store.registry.said import MAX_ERROR_BYTES, errors_said, refusal_of
from plugins.image_store.registry.urls import origin_of, parse_url, require_reachable
from supervisor import Denied, Untrusted

MAX_TOKEN_ANSWER_BYTES = 64 * 1024
MAX_TOKEN_CHARACTERS = 16 * 1024
CLIENT_ID = "attested-containers"
# token.md: what no expiry means. A token is left alone a little before it ends.
_LEAST_LIFETIME_S = 60
_SPARE_S = 10
_TOKEN = re.compile(r"[\x21-\x7e]+")


class Scope(msgspec.Struct, frozen=True):
    """What is to be done: `actions` is "pull" or "pull,push"."""

    repository: str
    actions: str

    def __str__(self) -> str:
        return f"repository:{self.repository}:{self.actions}"


class _TokenAnswer(msgspec.Struct):
    token: str = ""
    access_token: str = ""
    expires_in: int = _LEAST_LIFETIME_S


class _Grant(msgspec.Struct, frozen=True):
    """The value of an `Authorization` header, until a moment of trio's clock."""

    header: str
    expires_s: float


class Authenticator:
    """What is known of how one registry wants to be spoken to."""

    def __init__(
        self,
        registry: str,
        base: httpx.URL,
        credentials: Credentials,
        exchange: Exchange,
        *,
        plain_http: bool,
    ) -> None:
        self._registry = registry
        self._base = base
        self._credentials = credentials
        self._exchange = exchange
        self._plain_http = plain_http
        self._grants: dict[Scope, _Grant] = {}
        self._secrets: set[str] = set()

    @property
    def secrets(self) -> frozenset[str]:
        """What was sent to the registry or its token server, and what that answered."""
        return frozenset(self._secrets)

    def header(self, scope: Scope) -> str | None:
        """The `Authorization` for this scope; None: nothing was demanded yet, or it expired."""
        grant = self._grants.get(scope)
        if grant is None:
            return None
        if trio.current_time() >= grant.expires_s:
            del self._grants[scope]
            return None
        return grant.header

    async def meet(self, demanded: Sequence[str], scope: Scope) -> None:
        """Get what a 401 with these `WWW-Authenticate` lines demands; `header` then has it.

        Raises `Denied` without a login that is demanded, `Untrusted` for what no registry may
        demand, `Passing` when the token server fails.
        """
        self._grants.pop(scope, None)
        challenges = {one.scheme: one for one in reversed(parse_challenges(demanded))}
        login = self._credentials.login(self._registry, scope.repository)
        if login is not None:
            self._secrets.update(login.secrets)
        if "bearer" in challenges:
            self._grants[scope] = await self._token(challenges["bearer"], scope, login)
        elif "basic" in challenges:
            if login is None or not login.user:
                raise Denied(
                    self._registry,
                    "the registry demands a login",
                    expected="a user's name and password",
                    actual=f"none for it in {self._credentials.source}",
                )
            self._grants[scope] = _Grant(login.basic, float("inf"))
        else:
            raise Untrusted(
                self._registry,
                "the registry must demand a way to log in that is known here",
                expected="Bearer or Basic",
                actual=", ".join(sorted(challenges))[:80] or "none",
            )

    async def _token(self, challenge: Challenge, scope: Scope, login: Login | None) -> _Grant:
        item = f"token server of {self._registry}"
        realm = parse_url(challenge.parameters.get("realm", ""), item=item)
        require_reachable(
            self._base, realm, plain_http=self._plain_http, item=item, what="token realm"
        )
        asked = {"scope": str(scope)}
        if "service" in challenge.parameters:
            asked["service"] = challenge.parameters["service"]
        if login is not None and login.identity_token:
            form = {
                "grant_type": "refresh_token",
                "client_id": CLIENT_ID,
                "refresh_token": login.identity_token,
                **asked,
            }
            answer = await self._exchange.send(
                "POST",
                realm,
                item=item,
                headers={"content-type": "application/x-www-form-urlencoded"},
                content=urlencode(form).encode("ascii"),
            )
        else:
            answer = await self._exchange.send(
                "GET",
                realm.copy_merge_params(asked),
                item=item,
                headers={"authorization": login.basic} if login is not None else None,
            )
        try:
            return await self._granted(answer)
        except Denied as error:
            if login is not None:
                raise
            where = f"a login; there is none for it in {self._credentials.source}"
            raise Denied(error.item, error.rule, expected=where, actual=error.actual) from None
        finally:
            await answer.aclose()

    async def _granted(self, answer: Answer) -> _Grant:
        if answer.status != 200:
            said = errors_said(await answer.beginning(max_bytes=MAX_ERROR_BYTES))
            refusal = refusal_of(answer.status, answer.item, said, expected={200})
            if answer.status in (408, 429) or answer.status >= 500:
                asked_s = retry_after_s(
                    answer.headers.get("retry-after"), answer.headers.get("date")
                )
                raise Passing(refusal, maybe_done=False, pause_s=asked_s)
            raise refusal
        body = await answer.read(max_bytes=MAX_TOKEN_ANSWER_BYTES)
        try:
            fields = msgspec.json.decode(body, type=_TokenAnswer)
        except (msgspec.DecodeError, RecursionError):
            # The decoder's words could hold a part of the token.
            fields = _TokenAnswer()
        token = fields.token or fields.access_token
        if len(token) > MAX_TOKEN_CHARACTERS or not _TOKEN.fullmatch(token):
            raise Untrusted(
                answer.item,
                "the token server must answer with a JSON object that holds a token",
                expected=f"token or access_token, {MAX_TOKEN_CHARACTERS} characters at most",
                actual=f"another answer from {origin_of(answer.url)}",
            )
        self._secrets.add(token)
        lifetime_s = max(fields.expires_in, _LEAST_LIFETIME_S) - _SPARE_S
        return _Grant(f"Bearer {token}", trio.current_time() + lifetime_s)
