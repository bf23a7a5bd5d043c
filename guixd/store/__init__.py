"""Files and SQLite, in bounded blocking steps, without Twisted.

`local` is the store: begin there.  `layout` makes its directories, `recovery` looks after a crash.

What is known: `database` is the one writer, `queries` all that can be asked, `schema` the tables,
`items` the values, `changes` whether others wrote; `derivations` remembers those that were read,
`survey` gives all items.  `durability` sees to the disk.

What comes in: `addition` (a client's archive), `importing` (signed ones) and `incoming` (a
substitute) go to a place of `staging` first, single texts by `placing` to their own.  `restore`
writes files, `canonical` gives them the metadata of the store, `links` and `optimise` share equal
ones.  `exporting` and `dump` let items out.

What goes: a `collector` asks `roots`, `otherroots` and `busy` what is in use and `liveness` what
follows; `removal` deletes, `poolcare` what nobody shares.  `locks` are between processes.

Trees that may be hostile: `trees` has it all; `descent` and `beneath` follow no link, `moves` and
`copying` rename and copy, `rewriting` and `finding` look for hash parts, `verify` compares.
"""
