"""The contract between server and clients, written once: every route with its messages. Who may call it: core/rights.py.

Bodies are JSON of the structs below, except for routes marked `raw`, which carry bytes. Unknown fields are ignored, so that
newer and older programs understand each other; `WIRE_VERSION` travels in the header of that name. A call that changes
something carries `Idempotency-Key`, made by the caller: the same key gets the same answer, once the first was acknowledged.
An error is an `ErrorAnswer` with the status of `STATUS_OF_ERROR`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Generic, TypeVar

from msgspec import Struct

from deskgrid.errors import (
    CallerError,
    Conflict,
    DeskgridError,
    Forbidden,
    InvalidInput,
    NotFound,
    StoreUnavailable,
    Unauthenticated,
)
from deskgrid.model.apps import App
from deskgrid.model.data import Blob, Data, DataKind, Delta, Disk, Visibility
from deskgrid.model.ids import AttemptId, SetId, Sha256, UserId, WorkerId
from deskgrid.model.jobs import Array, Attempt, Job, JobSpec, JobState
from deskgrid.model.machines import MachineKind, Network
from deskgrid.model.manifests import Bundle, DiskDetail, Revocation
from deskgrid.model.overlay import Connection, Hub, Peer
from deskgrid.model.placement import Attributes, Holder, Keep, Placement
from deskgrid.model.swarm import Turn, TurnAnswer
from deskgrid.model.users import AuditEntry, Group, Role, Token, User
from deskgrid.model.workers import Assignment, AttemptReport, Capacity, Profile, Worker

IDEMPOTENCY_HEADER = "Idempotency-Key"
WIRE_VERSION_HEADER = "Deskgrid-Wire"
UPLOAD_OFFSET_HEADER = "Upload-Offset"
WIRE_VERSION = (1, 2)
"""Major and minor. A server accepts its own minor version and the two before."""
SERVER_NAME = "server.deskgrid"
"""The name in the server's certificate. Clients check this name against the grid's authority whatever address they dialled."""

STATUS_OF_ERROR: dict[type[DeskgridError], int] = {
    InvalidInput: 422,
    NotFound: 404,
    Conflict: 409,
    Unauthenticated: 401,
    Forbidden: 403,
    CallerError: 400,
    StoreUnavailable: 507,
}


class Method(StrEnum):
    GET = "GET"
    POST = "POST"
    PATCH = "PATCH"
    PUT = "PUT"
    DELETE = "DELETE"


class Nothing(Struct, frozen=True):
    """An empty message."""


class ErrorAnswer(Struct, frozen=True):
    """What went wrong, for people (`message`, `hint`) and programs (`error`: the class's name in errors.py)."""

    error: str
    message: str
    hint: str = ""
    request: str = ""
    """By which the server's logs know the call."""


# Grid and accounts


class GridInfo(Struct, frozen=True):
    """What anybody may know."""

    name: str
    version: str
    wire: tuple[int, int]


class JoinRequest(Struct, frozen=True, kw_only=True):
    """A PC asks to become a worker. It makes its token itself, so that nobody else ever has it."""

    secret: str
    name: str
    """For people; need not be unique."""
    token_hash: Sha256


class JoinPilot(Struct, frozen=True, kw_only=True):
    """A pilot, with its job's own token, asks to become a worker: once in an attempt."""

    name: str
    token_hash: Sha256


class JoinAnswer(Struct, frozen=True, kw_only=True):
    worker_id: WorkerId


class LoginRequest(Struct, frozen=True, kw_only=True):
    """A person's program, with a one-use secret, makes a token of its own known."""

    secret: str
    token_hash: Sha256
    label: str = ""
    """For the list of tokens, such as the PC's name."""
    lifetime_s: float = 0.0
    """How long the token shall be valid; 0: as long as the server lets it be, which it is at most."""


class LoginAnswer(Struct, frozen=True, kw_only=True):
    user: User
    expires_at: float | None = None


class AddToken(Struct, frozen=True, kw_only=True):
    """Make another token of the caller's known, narrowed to some rights. It outlives a narrowed token that makes it in no case."""

    token_hash: Sha256
    rights: tuple[str, ...]
    lifetime_s: float
    label: str = ""


class WhoAmI(Struct, frozen=True, kw_only=True):
    role: Role
    name: str
    expires_at: float | None = None
    """When the token ends."""
    rights: tuple[str, ...] = ()
    """What the token is narrowed to; none: all that its holder may."""
    user_id: UserId | None = None
    """None: it is no user's token, nor a job's."""
    secrets_key: str = ""
    """To which users seal the secrets of their jobs (core/sealing.py); empty: an older server, which takes none."""


class SecretRequest(Struct, frozen=True, kw_only=True):
    """Make a join secret (workers) or a login secret (one user) known. The caller makes it and puts it into a link."""

    secret_hash: Sha256
    lifetime_s: float = 7 * 86400.0
    uses: int = 1
    owner: str = ""
    """Of a join secret: the user whose PCs they are. A user's are always his own; an admin's, if it names none, nobody's."""
    pilot_s: float = 0.0
    """Of a join secret: what joins by it is a pilot of the caller's, for so many seconds. 0: a worker."""


class SecretAnswer(Struct, frozen=True, kw_only=True):
    expires_at: float


class AddUser(Struct, frozen=True, kw_only=True):
    name: str
    admin: bool = False


class SetUser(Struct, frozen=True, kw_only=True):
    """Change a user's part of the grid. What is not said stays; a bound below 0: what the server says for all."""

    weight: float | None = None
    max_waiting: int | None = None
    max_running: int | None = None
    max_bytes: int | None = None


class SetGroup(Struct, frozen=True, kw_only=True):
    """Change a group's part of the grid."""

    weight: float | None = None


class ReserveWorker(Struct, frozen=True, kw_only=True):
    """Keep a worker for a user's or group's jobs."""

    reserved_for: str = ""
    """user:NAME or group:NAME; empty: for nobody any more."""
    lifetime_s: float = 0.0
    """How long; 0: until it is cleared."""


class AuditLog(Struct, frozen=True, kw_only=True):
    entries: tuple[AuditEntry, ...]
    """Newest first."""
    more: bool
    """There are older ones: ask again with `before` set to the last id."""


class UserList(Struct, frozen=True):
    users: tuple[User, ...]


class TokenList(Struct, frozen=True):
    tokens: tuple[Token, ...]


class AddGroup(Struct, frozen=True, kw_only=True):
    name: str


class SetMembers(Struct, frozen=True, kw_only=True):
    """Add and remove members of a group."""

    add: tuple[str, ...] = ()
    remove: tuple[str, ...] = ()


class GroupList(Struct, frozen=True):
    groups: tuple[Group, ...]


# Data


class BeginUpload(Struct, frozen=True, kw_only=True):
    """Begin or continue an upload; the same sha256 by the same caller continues where it stopped."""

    blob: Blob
    direct: bool = False
    """The caller can send parts to URLs that the answer names."""


class UploadPart(Struct, frozen=True, kw_only=True):
    """Bytes to PUT to a URL of the blob store, with exactly these headers and without any token of the grid's."""

    offset: int
    size_bytes: int
    url: str
    headers: dict[str, str] = {}


class Upload(Struct, frozen=True, kw_only=True):
    id: int
    received_bytes: int
    complete: bool
    """All bytes are there and their sha256 is right."""
    parts: tuple[UploadPart, ...] = ()
    """What is to be sent next to the blob store; then begin again. The URLs expire."""
    checking: bool = False
    """All bytes are there, and the server reads them to check their sha256: begin again to hear how that ended."""


class RegisterData(Struct, frozen=True, kw_only=True):
    """Name an uploaded blob. A name that exists gets a new version."""

    name: str
    kind: DataKind
    blob: Blob
    visibility: Visibility = Visibility.PRIVATE
    group: str = ""
    """With visibility `group`: whose members may use it."""
    disk: Disk | None = None
    delta: Delta | None = None
    """Of a disk: how it is made from an older one that the caller may use; its bytes have been uploaded, too."""


class DataList(Struct, frozen=True):
    data: tuple[Data, ...]


class EndorseDisk(Struct, frozen=True, kw_only=True):
    """Vouch for a disk."""

    endorser: str = ""
    """Who does: user:NAME (the caller himself; empty means that), group:NAME of his, or grid (an admin)."""
    lifetime_s: float = 180 * 86400.0


class RevokeDisk(Struct, frozen=True, kw_only=True):
    """Let a disk not be started any more."""

    reason: str


class DiskList(Struct, frozen=True):
    disks: tuple[DiskDetail, ...]


# Jobs


class SubmitJob(Struct, frozen=True, kw_only=True):
    spec: JobSpec
    context: Blob | None = None
    """An uploaded archive with the context folder."""
    secrets: bytes = b""
    """What the spec's `secrets` names, sealed to WhoAmI.secrets_key for the submitter (core/sealing.py)."""


class SubmitArray(Struct, frozen=True, kw_only=True):
    """Many jobs of one spec: `{index}` is filled in with 0 to count - 1, and the names of a table's columns with its lines."""

    spec: JobSpec
    count: int
    context: Blob | None = None
    table: Blob | None = None
    """An uploaded blob of `count` lines, each a JSON list of texts, one for each of `names`."""
    names: tuple[str, ...] = ()
    secrets: bytes = b""
    """As in SubmitJob; all its jobs have the same."""


class ArrayList(Struct, frozen=True, kw_only=True):
    arrays: tuple[Array, ...]
    """Newest first."""
    more: bool
    """There are older ones: ask again with `before` set to the last id."""


class SetMember(Struct, frozen=True, kw_only=True):
    """A job or an array of a set. In its spec, `reach` may name services of other members as SERVICE.MEMBER.set, and `after` members."""

    name: str
    spec: JobSpec
    context: Blob | None = None
    count: int = 0
    """0: a job; otherwise an array, as in SubmitArray."""
    table: Blob | None = None
    names: tuple[str, ...] = ()
    secrets: bytes = b""


class SubmitSet(Struct, frozen=True, kw_only=True):
    """Several jobs and arrays that belong together, all or none of them."""

    name: str
    members: tuple[SetMember, ...]
    together: bool = False
    """None starts before there is a worker for each."""


class MemberState(Struct, frozen=True, kw_only=True):
    """A member of a set as it stands: a job or an array."""

    name: str
    job: Job | None = None
    array: Array | None = None


class JobSet(Struct, frozen=True, kw_only=True):
    """A set as it stands."""

    id: SetId
    owner_id: UserId
    owner: str
    name: str
    together: bool
    created_at: float
    members: tuple[MemberState, ...]
    waits_for: str = ""
    """Why a set that starts together has not started, for people."""


class SetList(Struct, frozen=True, kw_only=True):
    sets: tuple[JobSet, ...]
    """Newest first."""
    more: bool


class RegisterApp(Struct, frozen=True, kw_only=True):
    """Publish an app. A name that exists gets a new version."""

    name: str
    visibility: Visibility = Visibility.PRIVATE
    group: str = ""
    defaults: dict[str, Any] = {}
    files: dict[str, Blob] = {}
    """Uploaded archives by platform."""


class AppList(Struct, frozen=True):
    apps: tuple[App, ...]


class JobDetail(Struct, frozen=True, kw_only=True):
    job: Job
    attempts: tuple[Attempt, ...]


class JobList(Struct, frozen=True, kw_only=True):
    jobs: tuple[Job, ...]
    """Newest first."""
    more: bool
    """There are older ones: ask again with `before` set to the last id."""


class LogChunk(Struct, frozen=True, kw_only=True):
    attempt_id: AttemptId | None
    """The attempt that was read: the one asked for, or the newest; None if there is none yet."""
    number: int
    offset: int
    data: bytes
    ended: bool
    """The attempt is over and this chunk is the last."""


class Leaving(Struct, frozen=True, kw_only=True):
    """What is removed from the repository within the next seconds (not counting what a shorter time has already)."""

    within_s: float
    size_bytes: int


class GridStatus(Struct, frozen=True, kw_only=True):
    """The grid at a glance."""

    workers_online: int
    workers_paused: int
    workers_offline: int
    lent: Capacity
    """Of the workers online."""
    jobs: dict[JobState, int]
    completed_last_hour: int
    storage_bytes: int
    """Blobs in the repository."""
    storage_free_bytes: int
    """On the server's disk."""
    storage_place: str = ""
    """Where blobs are if not on the server's disk."""
    storage: dict[str, int] = {}
    """Bytes by what refers to them: disks, contexts, results, other. What has several uses counts as the first of them."""
    storage_users: dict[str, int] = {}
    """For admins: bytes that each user keeps."""
    leaving: tuple[Leaving, ...] = ()


class PlaceData(Struct, frozen=True, kw_only=True):
    """What the caller wants of his data of these names."""

    pattern: str
    """NAME, NAME@VERSION, or a name with * and ?."""
    attributes: Attributes
    lifetime_s: float = 0.0
    """From now on, instead of `expires_at`; 0: what that says."""


class PlacementList(Struct, frozen=True):
    placements: tuple[Placement, ...]


class HolderList(Struct, frozen=True):
    holders: tuple[Holder, ...]


class WorkerList(Struct, frozen=True):
    workers: tuple[Worker, ...]


class WaitingClass(Struct, frozen=True, kw_only=True):
    """Waiting jobs that need the same, as of a second ago."""

    jobs: int
    kind: MachineKind
    network: Network
    cpus: int
    memory_bytes: int
    packages: tuple[str, ...] = ()
    platforms: tuple[str, ...] = ()
    wall_time_s: float = 3600.0
    """How long one may take."""
    workers: int = 0
    """Online, that could run them if they were free; pilots aside."""


class WaitingList(Struct, frozen=True):
    classes: tuple[WaitingClass, ...]


# Workers


class Sync(Struct, frozen=True, kw_only=True):
    """All that a worker has to say, in one call: it renews, reports and asks."""

    profile: Profile
    paused: bool
    attempts: tuple[AttemptReport, ...]
    """Every attempt it holds. What the server leased earlier and is not listed goes back at once."""
    free: Capacity
    """What new attempts may use; all zero when it wants none."""
    cached: tuple[Sha256, ...]
    """Unpacked disks in its cache."""
    held: tuple[Sha256, ...] = ()
    """Other data in its cache."""
    ahead: dict[int, int] = {}
    """Of these requirement classes, whose jobs it ends quickly, so many jobs more than fit into `free`."""
    left_s: float | None = None
    """Seconds for which it is a worker yet; None: no bound."""


class SyncAnswer(Struct, frozen=True, kw_only=True):
    assignments: tuple[Assignment, ...]
    acknowledged: tuple[AttemptId, ...]
    """Final reports that are stored now; the worker may forget these attempts."""
    cancelled: tuple[AttemptId, ...]
    """Attempts to stop and forget: their job is over, or they are not this worker's any more."""
    lease_s: float
    """Seconds for which the listed and the new attempts are leased, counted from before the request was sent."""
    interval_s: float
    """Seconds after which the worker is expected to call again."""
    hold_s: float = 60.0
    """Seconds for which a wake call may be held; 0: do not make one, there are too many workers for that."""
    started: tuple[AttemptId, ...] = ()
    """Attempts that were held and may start now."""
    consoles: tuple[AttemptId, ...] = ()
    """Listed attempts without a network whose owner wants to see their machine's screen: to be peers of the overlay as long as that is so."""
    keep: tuple[Keep, ...] = ()
    """What it is to hold, all of it: it fetches what it lacks, and does not evict it."""
    remove: tuple[Sha256, ...] = ()
    """Disks and other data whose lifetime has ended: to be removed unless an attempt uses them."""
    fetch: tuple[Keep, ...] = ()
    """Disks that jobs wait for: to be fetched, if there is time, before one comes."""
    guard: tuple[Sha256, ...] = ()
    """Of what it has, what is wanted and nobody else has: not to be evicted."""
    share: tuple[Sha256, ...] = ()
    """Of its `held`, what others fetch now: to be given to them."""


class Wake(Struct, frozen=True, kw_only=True):
    """A hint without content: something changed for this worker, call sync. Losing it costs only latency."""

    changed: bool


class AppendLog(Struct, frozen=True, kw_only=True):
    """Live output of an attempt. Bytes that the server has already are ignored; a gap is filled with nothing."""

    attempt_id: AttemptId
    stream: str
    """stdout, stderr or console."""
    offset: int
    data: bytes


# Overlay


class PeerOffer(Struct, frozen=True):
    """A service on a user's PC."""

    name: str
    share: tuple[str, ...] = ()
    """Who may reach it besides his own jobs and programs: group:NAME, user:NAME or everyone."""


class RegisterPeer(Struct, frozen=True, kw_only=True):
    """Make a peer known, or renew it: the same key is the same peer. It is forgotten after `lifetime_s` of the answer."""

    key: str
    """Its public key: ECDSA on P-256, SubjectPublicKeyInfo in PEM."""
    attempt_id: AttemptId | None = None
    """From a worker: the attempt that it holds and that this peer is for."""
    offers: tuple[PeerOffer, ...] = ()
    """From a user. What a job offers is in its spec."""
    hub: str = ""
    """Name of the hub where it is registered; empty while it is at none."""
    connections: tuple[Connection, ...] = ()
    """What it carries now, for people."""
    job_token_hash: Sha256 | None = None
    """From a worker: the token made for the job, if the job's spec reaches api.server."""


class PeerAnswer(Struct, frozen=True, kw_only=True):
    peer_id: int
    name: str
    """In the certificate."""
    certificate: str
    """PEM, signed by the grid's authority."""
    grant_key: str
    """Ed25519 public key by which grants are checked, PEM."""
    hubs: tuple[Hub, ...]
    """Those alive, in no order."""
    now: float
    """The server's time, in which grants expire."""
    lifetime_s: float


class AskGrant(Struct, frozen=True, kw_only=True):
    peer_id: int
    """The caller's peer that will connect."""
    service: str
    """SERVICE.PEER"""


class GrantAnswer(Struct, frozen=True, kw_only=True):
    """A grant, or why there is none yet: then asking again may help."""

    grant: str = ""
    target: str = ""
    """Name in the certificate of the peer to reach."""
    hub: Hub | None = None
    """Where that peer is registered."""
    lifetime_s: float = 0.0
    waiting_for: str = ""


class PeerList(Struct, frozen=True):
    peers: tuple[Peer, ...]


class JoinHub(Struct, frozen=True, kw_only=True):
    """A machine asks to become a hub. It makes key and token itself."""

    secret: str
    name: str
    """For people."""
    token_hash: Sha256


class JoinHubAnswer(Struct, frozen=True, kw_only=True):
    hub_id: int


class RenewHub(Struct, frozen=True, kw_only=True):
    """A hub says that it is there; it does so every third of `lifetime_s`."""

    key: str
    """Its public key, PEM."""
    address: str
    """HOST:PORT that peers dial."""
    peers: int
    """Registered now."""
    leaving: bool = False
    """It ends now: nobody is to be sent there."""


class HubAnswer(Struct, frozen=True, kw_only=True):
    name: str
    """In the certificate."""
    certificate: str
    grant_key: str
    now: float
    lifetime_s: float


class HubDetail(Struct, frozen=True, kw_only=True):
    hub: Hub
    label: str
    """Its name for people."""
    peers: int
    alive: bool


class HubList(Struct, frozen=True):
    hubs: tuple[HubDetail, ...]


# Routes

Request = TypeVar("Request")
Answer = TypeVar("Answer")


class Route(Generic[Request, Answer]):
    """One call: how to make it and what it carries. `path` has {names} for its parameters. Who may make it stands in core/rights.py."""

    def __init__(
        self,
        name: str,
        method: Method,
        path: str,
        request: type[Request],
        answer: type[Answer],
        summary: str,
        *,
        query: dict[str, type] | None = None,
        raw: bool = False,
    ) -> None:
        self.name = name
        self.method = method
        self.path = path
        self.request = request
        self.answer = answer
        self.summary = summary
        self.query = query or {}
        self.raw = raw
        ROUTES[name] = self

    def status_of(self, error: DeskgridError) -> int:
        """Return the HTTP status by which an error is told."""
        return next((status for kind, status in STATUS_OF_ERROR.items() if isinstance(error, kind)), 500)


ROUTES: dict[str, Route[Any, Any]] = {}
_GET, _POST, _PATCH, _DELETE = Method.GET, Method.POST, Method.PATCH, Method.DELETE

GRID = Route("grid", _GET, "/v1/grid", Nothing, GridInfo, "Name and versions of the grid")
AUTHORITY = Route("authority", _GET, "/v1/authority", Nothing, bytes, "Certificate of the grid's authority, PEM", raw=True)
JOIN = Route("join", _POST, "/v1/join", JoinRequest, JoinAnswer, "Become a worker with a join secret")
JOIN_PILOT = Route("join_pilot", _POST, "/v1/pilots", JoinPilot, JoinAnswer, "Become a worker, as the pilot that a job is")
LOGIN = Route("login", _POST, "/v1/login", LoginRequest, LoginAnswer, "Exchange a login secret for a token")
WHO = Route("who", _GET, "/v1/who", Nothing, WhoAmI, "Whose token this is")
METRICS = Route("metrics", _GET, "/metrics", Nothing, bytes, "Figures of this process and of the grid, for Prometheus", raw=True)
LIST_AUDIT = Route(
    "list_audit",
    _GET,
    "/v1/audit",
    Nothing,
    AuditLog,
    "Who did what, newest first",
    query={"user": str, "since": float, "before": int, "limit": int},
)
STATUS = Route("status", _GET, "/v1/status", Nothing, GridStatus, "The grid at a glance")

ADD_JOIN_SECRET = Route("add_join_secret", _POST, "/v1/join-secrets", SecretRequest, SecretAnswer, "Make a join secret")
ADD_USER = Route("add_user", _POST, "/v1/users", AddUser, User, "Add a user")
SET_USER = Route("set_user", _PATCH, "/v1/users/{user}", SetUser, User, "Change a user's part of the grid")
LIST_USERS = Route("list_users", _GET, "/v1/users", Nothing, UserList, "List users")
ADD_LOGIN_SECRET = Route(
    "add_login_secret",
    _POST,
    "/v1/users/{user}/login-secrets",
    SecretRequest,
    SecretAnswer,
    "Make a login secret for a user",
)
LIST_TOKENS = Route("list_tokens", _GET, "/v1/tokens", Nothing, TokenList, "List the caller's tokens")
ADD_TOKEN = Route("add_token", _POST, "/v1/tokens", AddToken, Token, "Make a narrowed token of the caller's known")
RENEW_TOKEN = Route(
    "renew_token", _POST, "/v1/tokens/renew", Nothing, WhoAmI, "Let the token that is used live on, as after a login"
)
REVOKE_TOKEN = Route("revoke_token", _DELETE, "/v1/tokens/{token}", Nothing, Nothing, "Revoke a token of the caller's")
ADD_GROUP = Route("add_group", _POST, "/v1/groups", AddGroup, Group, "Add a group")
SET_GROUP = Route("set_group", _PATCH, "/v1/groups/{group}", SetGroup, Group, "Change a group's part of the grid")
LIST_GROUPS = Route("list_groups", _GET, "/v1/groups", Nothing, GroupList, "List groups with their members")
SET_MEMBERS = Route("set_members", _POST, "/v1/groups/{group}/members", SetMembers, Group, "Change a group's members")
RESERVE_WORKER = Route(
    "reserve_worker", _POST, "/v1/workers/{worker}/reservation", ReserveWorker, Worker, "Keep a worker for a user or group"
)
REMOVE_WORKER = Route(
    "remove_worker", _DELETE, "/v1/workers/{worker}", Nothing, Nothing, "Forget a worker and its token; live attempts go back"
)
LIST_WAITING = Route(
    "list_waiting", _GET, "/v1/waiting", Nothing, WaitingList, "What the caller's jobs and those of his groups wait for"
)
LIST_WORKERS = Route("list_workers", _GET, "/v1/workers", Nothing, WorkerList, "List workers")

BEGIN_UPLOAD = Route("begin_upload", _POST, "/v1/uploads", BeginUpload, Upload, "Begin or continue an upload")
UPLOAD_BYTES = Route(
    "upload_bytes",
    _PATCH,
    "/v1/uploads/{upload}",
    bytes,
    Upload,
    "Append bytes at the offset of the Upload-Offset header",
    raw=True,
)
GET_BLOB = Route(
    "get_blob",
    _GET,
    "/v1/blobs/{sha256}",
    Nothing,
    bytes,
    "Bytes of a blob; ranges are served. With `direct` the answer may be a redirect to the blob store",
    query={"direct": bool},
    raw=True,
)
PLACE_DATA = Route(
    "place_data", _POST, "/v1/placements", PlaceData, Placement, "Say on how many workers, where and for how long data should be"
)
LIST_PLACEMENTS = Route("list_placements", _GET, "/v1/placements", Nothing, PlacementList, "The caller's placements")
REMOVE_PLACEMENT = Route(
    "remove_placement", _DELETE, "/v1/placements/{placement}", Nothing, Nothing, "Forget a placement of the caller's"
)
LIST_HOLDERS = Route(
    "list_holders",
    _GET,
    "/v1/data/{reference}/holders",
    Nothing,
    HolderList,
    "Workers that have data, or are to have it; held until it is not as `seen`",
    query={"seen": str, "wait_s": float},
)
TAKE_TURN = Route(
    "take_turn",
    _POST,
    "/v1/blobs/{sha256}/swarm",
    Turn,
    TurnAnswer,
    "Take part in fetching a blob together: which pieces from whom",
)
REGISTER_DATA = Route("register_data", _POST, "/v1/data", RegisterData, Data, "Name an uploaded blob")
LIST_DATA = Route("list_data", _GET, "/v1/data", Nothing, DataList, "List data", query={"kind": str})
GET_DATA = Route("get_data", _GET, "/v1/data/{reference}", Nothing, Data, "Find data by name, name@version or sha256")
REMOVE_DATA = Route("remove_data", _DELETE, "/v1/data/{reference}", Nothing, Nothing, "Remove a version of data")

LIST_DISKS = Route(
    "list_disks",
    _GET,
    "/v1/disks",
    Nothing,
    DiskList,
    "List disks with who vouches for them",
    query={"words": str, "os": str, "arch": str, "endorser": str},
)
GET_DISK = Route("get_disk", _GET, "/v1/disks/{reference}", Nothing, DiskDetail, "A disk with all that is said of it")
ENDORSE_DISK = Route("endorse_disk", _POST, "/v1/disks/{reference}/manifests", EndorseDisk, DiskDetail, "Vouch for a disk")
WITHDRAW_DISK = Route(
    "withdraw_disk", _DELETE, "/v1/disks/{reference}/manifests/{endorser}", Nothing, DiskDetail, "Vouch for a disk no more"
)
REVOKE_DISK = Route(
    "revoke_disk", _POST, "/v1/disks/{reference}/revocation", RevokeDisk, Revocation, "Let a disk not be started any more"
)
GET_BUNDLE = Route(
    "get_bundle", _GET, "/v1/disks/{reference}/bundle", Nothing, Bundle, "What this grid says of a disk, to carry to another"
)
TAKE_BUNDLE = Route("take_bundle", _POST, "/v1/bundles", Bundle, DiskList, "Keep what a trusted grid says of disks that are here")

SUBMIT_JOB = Route("submit_job", _POST, "/v1/jobs", SubmitJob, Job, "Submit a job")
LIST_JOBS = Route(
    "list_jobs",
    _GET,
    "/v1/jobs",
    Nothing,
    JobList,
    "List jobs, newest first",
    query={"state": str, "before": int, "limit": int, "all": bool, "array": int, "group": str},
)
GET_JOB = Route(
    "get_job",
    _GET,
    "/v1/jobs/{job}",
    Nothing,
    JobDetail,
    "A job with its attempts; with wait_s the answer is held until something changed since `seen` (attempt states joined by commas)",
    query={"wait_s": float, "seen": str},
)
REMOVE_JOB = Route("remove_job", _DELETE, "/v1/jobs/{job}", Nothing, Nothing, "Remove a job that has ended, with its result")
CANCEL_JOB = Route("cancel_job", _POST, "/v1/jobs/{job}/cancel", Nothing, Job, "Cancel a job; final jobs stay as they are")
SUBMIT_ARRAY = Route("submit_array", _POST, "/v1/arrays", SubmitArray, Array, "Submit an array of jobs")
LIST_ARRAYS = Route(
    "list_arrays",
    _GET,
    "/v1/arrays",
    Nothing,
    ArrayList,
    "List arrays, newest first",
    query={"before": int, "limit": int, "all": bool, "group": str},
)
GET_ARRAY = Route(
    "get_array",
    _GET,
    "/v1/arrays/{array}",
    Nothing,
    Array,
    "An array with its counts; with wait_s the answer is held until it has another state, or more jobs have ended, than in `seen`",
    query={"wait_s": float, "seen": str},
)
REMOVE_ARRAY = Route(
    "remove_array", _DELETE, "/v1/arrays/{array}", Nothing, Nothing, "Remove an array that has ended, with its results"
)
CANCEL_ARRAY = Route("cancel_array", _POST, "/v1/arrays/{array}/cancel", Nothing, Array, "Cancel what has not ended of an array")
SUBMIT_SET = Route("submit_set", _POST, "/v1/sets", SubmitSet, JobSet, "Submit several jobs and arrays that belong together")
LIST_SETS = Route(
    "list_sets",
    _GET,
    "/v1/sets",
    Nothing,
    SetList,
    "List sets, newest first",
    query={"before": int, "limit": int, "all": bool},
)
GET_SET = Route(
    "get_set",
    _GET,
    "/v1/sets/{set}",
    Nothing,
    JobSet,
    "A set with its members; with wait_s the answer is held until one of them has changed since `seen`",
    query={"wait_s": float, "seen": str},
)
CANCEL_SET = Route("cancel_set", _POST, "/v1/sets/{set}/cancel", Nothing, JobSet, "Cancel all that has not ended of a set")
REGISTER_APP = Route("register_app", _POST, "/v1/apps", RegisterApp, App, "Publish an app")
LIST_APPS = Route("list_apps", _GET, "/v1/apps", Nothing, AppList, "List apps")
GET_APP = Route("get_app", _GET, "/v1/apps/{reference}", Nothing, App, "Find an app by name or name@version")
REMOVE_APP = Route("remove_app", _DELETE, "/v1/apps/{reference}", Nothing, Nothing, "Remove a version of an app; jobs keep it")
READ_LOG = Route(
    "read_log",
    _GET,
    "/v1/jobs/{job}/log",
    Nothing,
    LogChunk,
    "Output of an attempt from an offset",
    query={"stream": str, "attempt": int, "offset": int},
)

SYNC = Route("sync", _POST, "/v1/worker/sync", Sync, SyncAnswer, "Renew, report and ask")
WAKE = Route("wake", _GET, "/v1/worker/wake", Nothing, Wake, "Wait for a hint that sync is worth calling", query={"wait_s": float})
APPEND_LOG = Route("append_log", _POST, "/v1/worker/log", AppendLog, Nothing, "Append live output of an attempt")
LEAVE = Route("leave", _POST, "/v1/worker/leave", Nothing, Nothing, "Leave the grid; live attempts go back")

REGISTER_PEER = Route("register_peer", _POST, "/v1/peers", RegisterPeer, PeerAnswer, "Make a peer known, or renew it")
LIST_PEERS = Route(
    "list_peers", _GET, "/v1/peers", Nothing, PeerList, "The caller's peers, and what they carry", query={"all": bool}
)
REMOVE_PEER = Route("remove_peer", _DELETE, "/v1/peers/{peer}", Nothing, Nothing, "Forget a peer of the caller's")
ASK_GRANT = Route(
    "ask_grant",
    _POST,
    "/v1/grants",
    AskGrant,
    GrantAnswer,
    "Get the permission to reach a service; waits up to `wait_s` for a service that is not there yet",
    query={"wait_s": float},
)
ADD_HUB_SECRET = Route("add_hub_secret", _POST, "/v1/hub-secrets", SecretRequest, SecretAnswer, "Make a secret for a hub")
JOIN_HUB = Route("join_hub", _POST, "/v1/hubs", JoinHub, JoinHubAnswer, "Become a hub with a hub secret")
RENEW_HUB = Route("renew_hub", _POST, "/v1/hub", RenewHub, HubAnswer, "Say that a hub is there, and get its certificate")
LIST_HUBS = Route("list_hubs", _GET, "/v1/hubs", Nothing, HubList, "List hubs")
REMOVE_HUB = Route("remove_hub", _DELETE, "/v1/hubs/{hub}", Nothing, Nothing, "Forget a hub and its token")


def change_mark(detail: JobDetail) -> str:
    """Return a short text that differs whenever the state of the job or of one of its attempts does."""
    return ",".join([detail.job.state, *(f"{attempt.number}{attempt.state}" for attempt in detail.attempts)])


def array_mark(array: Array) -> str:
    """Return a short text that differs whenever an array's state or the number of its jobs in some state does."""
    return ",".join([array.state, *(str(array.jobs.get(state, 0)) for state in JobState)])


def holders_mark(found: HolderList) -> str:
    """Return a short text that differs whenever a worker gets data, loses it, or is to get it."""
    return ",".join(f"{one.worker_id}{one.state}" for one in found.holders)


def set_mark(found: JobSet) -> str:
    """Return a short text that differs whenever a member of a set has changed."""
    marks = [member.job.state if member.job else array_mark(member.array) if member.array else "" for member in found.members]
    return ";".join([found.waits_for, *marks])


def set_ended(found: JobSet) -> bool:
    """Tell whether nothing of a set can start any more, or runs."""
    states = [member.job.state if member.job else member.array.state if member.array else "" for member in found.members]
    return all(state in ("completed", "failed", "cancelled", "ended") for state in states)
