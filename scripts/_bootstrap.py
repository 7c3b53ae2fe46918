# ruff: noqa
"""Temporary: removed at the end of the restructuring."""

from _steps import *
from _models import *
from _paths import *
from _environments import *
from _process_lock import *
from _lockfile import *
