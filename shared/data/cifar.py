from shared.data.formats import *  # noqa: F403
