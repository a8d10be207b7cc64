from shared.data.writers import *  # noqa: F403
