"""The verbs a user types, and the modules they are made of. The only room that knows all the others."""

from elastic_rec.configs.stack import check_versions

check_versions()
