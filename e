error: examples/apt-voter/profiles/small.yaml:4:10: plugins: no plugin provider 'voter' is installed; installed: align, moe, rag, routing
