"""Write `infra/policies/ROLE.json` anew from the table in `encode.stack.policies`: run it after a change there."""

from pathlib import Path

from encode.stack.policies import ROLES, to_text

FOLDER = Path(__file__).parent / "policies"


def main() -> None:
    """Write one file a role."""
    for role in ROLES:
        (FOLDER / f"{role}.json").write_text(to_text(role))


if __name__ == "__main__":
    main()
