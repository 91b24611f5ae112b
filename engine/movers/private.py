"""Whether a file that holds a key or a secret is for this process alone."""

import os
import stat


def private(found: os.stat_result) -> bool:
    """Its owner alone may read it; or, where another one owns it, our own group, as in a Secret that is mounted.

    Kubernetes gives the files of a Secret to root and lets the pod's group read them (fsGroup).
    """
    mode = stat.S_IMODE(found.st_mode)
    if found.st_uid == os.geteuid():
        return not mode & 0o077
    return not mode & 0o037 and found.st_gid in (os.getegid(), *os.getgroups())
