"""ModelGenerator's YAML, read as its `mgen predict` reads it and told in our own terms.

The only room that knows the foreign configuration. Its doors, in the order of use:

- `sources.read_arguments`, `sources.is_foreign`: what of a command line, or which file, is theirs.
- `merging.merge_configs`: files and dotted flags, in order, to one `Foreign`.
- `translation.translate`: that to the values of a `RunConfig`, and what a `RunConfig` cannot say.
- `rows.Cut.of`: opened tables to the rows that its rules predict on.
- `translation.as_yaml`: the values as a config file of ours.

Nothing is imported here, so that a command may ask `sources` without NumPy.
"""
