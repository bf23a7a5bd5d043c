echo "writing the greeting"
mkdir "$out"
echo "Hello from $name, made $when." >"$out/message"
