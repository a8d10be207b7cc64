from shared.data.safe import *  # noqa: F403
