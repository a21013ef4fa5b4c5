"""What a store is: places, schema, manifests, versions, vocabularies; opening one."""
