"""Names, versions and keys over a store: publish, resolve, fetch, trust, check.

    stores/     move bytes; know nothing of what they mean
    documents   the files of a registry as types
    chain       numbered files, each naming the one before
    authority   events signed with a namespace's key
    registry    names, versions, keys, blobs
    publish     push, yank, unyank, rotate
    resolve     reference → version            search   words, base, task, rank → versions
    fetch       version → folder in the cache  cache    pulled packages by digest
    trust       which keys this user believes  verify   is a package what was signed?
    pull        reference → verified folder    check    is the whole registry sound?

Layout, the same in a folder, a git repository, a bucket or a web site:

    config.json                       the registry's name
    index/<namespace>/<name>/000001.json …   one event a file: publish, yank, unyank
    keys/<namespace>/000001.json …    which keys sign for the namespace, since which event
    blobs/sha256/<ab>/<64 hex>        every file of every package, once

An event file is created only if absent, so its number is the compare-and-swap: of two
publishers at once one gets the number and the other takes the next. Blobs come first and
the event last; whoever dies in between leaves blobs nobody names.
"""
