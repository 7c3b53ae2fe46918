"""The machine and OpenVINO: the shared Core, versions, devices, properties, memory, the compile cache, failures."""
