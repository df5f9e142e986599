#!/bin/sh
# Runs a compiler, and keeps what ptxas says of its kernels beside the object: the input of tools/ptxas_report.py.
# Everything else that the compiler says is shown.
object='' previous=''
for argument; do
  [ "$previous" = -o ] && object=$argument
  previous=$argument
done
"$@" 2>"$object.log"
status=$?
ptxas='^ptxas info +: (Compiling entry|Function properties|Used|Compile time|[0-9]+ bytes gmem)|^ +[0-9]+ bytes stack frame'
grep -E "$ptxas" "$object.log" >"$object.ptxas"
grep -Ev "$ptxas" "$object.log" >&2
rm "$object.log"
exit $status
