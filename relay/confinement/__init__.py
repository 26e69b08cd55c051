"""What the less privileged processes are confined to: capabilities, system calls, files."""
