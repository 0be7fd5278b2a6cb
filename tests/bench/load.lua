-- Requests made beforehand, all of one length, one after the other in a file. Each is sent once; a server that keeps
-- nothing may be sent them again (BENCH_AGAIN).
local path, size, again = os.getenv("BENCH_REQUESTS"), tonumber(os.getenv("BENCH_SIZE")), os.getenv("BENCH_AGAIN")
local file = nil

function request()
  if file == nil then file = assert(io.open(path, "rb")) end
  local bytes = file:read(size)
  if again and (bytes == nil or #bytes < size) then
    file:seek("set")
    bytes = file:read(size)
  end
  if bytes == nil or #bytes < size then
    io.stderr:write("the requests did not last\n")
    os.exit(3)
  end
  return bytes
end

function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format("RESULT %d %d %d %d %d %d %d\n", summary.requests, summary.duration,
    errors.status, errors.connect, errors.read, errors.write, errors.timeout))
end
