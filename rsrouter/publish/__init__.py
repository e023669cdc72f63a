"""Publishing a routed classifier to the Hub: what may go up, and the one commit that takes it there."""

from rsrouter.publish.commit import Publication, publish, write_card
from rsrouter.publish.files import check_pinned

__all__ = ["Publication", "check_pinned", "publish", "write_card"]
