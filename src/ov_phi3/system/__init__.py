"""OpenVINO and the machine: the shared Core, versions, devices, properties, memory, the compile cache, failures."""
