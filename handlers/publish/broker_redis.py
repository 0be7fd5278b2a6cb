"""Redis streams for the handler `publish`. A script adds a message and its id in one step, once.

An id is remembered in a key beside the stream, `{stream}:published:id`, which expires. The braces
keep both on one node of a cluster. The key is set before the message is added, and gets the entry's
id afterwards: a user without permission for these keys fails before anything is published twice.
"""

from collections.abc import Mapping
from typing import Any

from redis import exceptions
from redis.asyncio import BlockingConnectionPool, Connection, Redis, SSLConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from handlers.publish.broker import Access, BrokerError, BrokerUnreachableError, Message, excerpt

_PUBLISH = """
local known = redis.call('GET', KEYS[2])
if known and known ~= '' then return {known, 1} end
redis.call('SET', KEYS[2], '', 'EX', ARGV[1])
local entry = {'XADD', KEYS[1]}
if ARGV[2] ~= '' then
  for _, word in ipairs({'MAXLEN', '~', ARGV[2]}) do entry[#entry + 1] = word end
end
entry[#entry + 1] = '*'
for index = 3, #ARGV do entry[#entry + 1] = ARGV[index] end
local id = redis.call(unpack(entry))
redis.call('SET', KEYS[2], id, 'EX', ARGV[1])
return {id, 0}
"""


class RedisBroker:
    """Adds entries to a stream; the first creates it."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._redis = Redis(connection_pool=_create_pool(access))

    async def publish(self, message: Message) -> Mapping[str, Any]:
        fields = {"idempotency_key": message.id, "run_id": message.key, "data": message.body}
        fields |= {f"ce_{name}": value for name, value in message.attributes.items()}
        parts = [part for pair in fields.items() for part in pair]
        seconds = self._access.remember_hours * 3600
        id_key = f"{{{message.to}}}:published:{message.id}"
        maxlen = self._access.maxlen or ""
        entry, duplicate = await self._run_script(
            _PUBLISH, message.to, id_key, arguments=[seconds, maxlen, *parts]
        )
        return {"entry": entry.decode(), "duplicate": bool(duplicate)}

    async def check(self, to: str | None) -> None:
        if to is None:
            await self._run_script("return 1")
            return
        kind = await self._run_script("return redis.pcall('TYPE', KEYS[1])['ok'] or 'unknown'", to)
        if kind.decode() not in {"none", "stream", "unknown"}:
            raise BrokerError(f"{to!r} is a {kind.decode()}, not a stream: choose another name in `to`")

    async def close(self) -> None:
        await self._redis.aclose()
        await self._redis.connection_pool.disconnect()

    async def _run_script(self, script: str, *keys: str, arguments: list[Any] | None = None) -> Any:
        url = self._access.url
        try:
            return await self._redis.eval(script, len(keys), *keys, *(arguments or []))
        except exceptions.AuthenticationError as error:
            raise BrokerError(f"{url} refuses our credentials: {excerpt(error)}") from error
        except exceptions.NoPermissionError as error:
            raise BrokerError(
                f"{url} does not allow it: {excerpt(error)}; the user needs +eval +get +set +xadd"
            ) from error
        except (exceptions.ConnectionError, exceptions.TimeoutError, OSError) as error:
            raise BrokerUnreachableError(f"{url} cannot be reached: {excerpt(error)}") from error
        except exceptions.RedisError as error:
            raise BrokerError(f"{url} did not accept it: {excerpt(error)}{_hint(str(error))}") from error


def _hint(error: str) -> str:
    """Return what an operator can do about an error."""
    if "NOAUTH" in error:
        return "; set `password`"
    if "WRONGTYPE" in error:
        return "; choose another name in `to`"
    if "READONLY" in error:
        return "; it is a replica: use the primary"
    if error.startswith("MOVED") or "CLUSTERDOWN" in error:
        return "; it is a Redis Cluster: use the node that holds the stream"
    if "OOM" in error:
        return "; it is full: set `maxlen`, or give it more memory"
    return ""


def _create_pool(access: Access) -> BlockingConnectionPool:
    """Create a pool of one connection. Waiting for it counts towards the timeout of an attempt."""
    (host, port), *_ = access.hosts
    options: dict[str, Any] = {
        "host": host,
        "port": port,
        "db": int(access.path.strip("/") or 0),
        "username": access.user,
        "password": access.password,
        "socket_timeout": access.answer_seconds,
        "socket_connect_timeout": access.connect_seconds,
        "retry": Retry(NoBackoff(), 0),  # the dispatcher tries again
    }
    if access.tls is not None:
        options |= {
            "ssl_ca_certs": access.ca_file and str(access.ca_file),
            "ssl_certfile": access.cert_file and str(access.cert_file),
            "ssl_keyfile": access.key_file and str(access.key_file),
            "ssl_cert_reqs": "required",
            "ssl_check_hostname": True,
        }
    kind: type[Connection] = Connection if access.tls is None else SSLConnection
    return BlockingConnectionPool(max_connections=1, timeout=None, connection_class=kind, **options)
