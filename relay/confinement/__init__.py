"""What the less privileged processes are confined to: capabilities, system calls, files. docs/security.md tells why."""
