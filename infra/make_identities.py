"""Write the identities of SeaweedFS from the keys in the environment: compose runs it once, before the store starts."""

import os
import sys
from pathlib import Path

from encode.stack.policies import ROLES, identities


def main() -> None:
    """Write it to the path that is given. The store runs as another user, in whose volume nobody else looks."""
    admin = os.environ["OBJECT_STORE_ACCESS_KEY"], os.environ["OBJECT_STORE_SECRET_KEY"]
    secrets = {role: os.environ[f"{role.upper()}_SECRET_KEY"] for role in ROLES}
    Path(sys.argv[1]).write_text(identities(admin, secrets))


if __name__ == "__main__":
    main()
