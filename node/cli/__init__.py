"""The command line: `metaswarm VERB`. Each verb is a module, imported when it is called."""
