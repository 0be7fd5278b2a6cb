-- Requests made beforehand, all of one length, one after the other in a file; each is sent once, none twice.
local path, size = os.getenv("BENCH_REQUESTS"), tonumber(os.getenv("BENCH_SIZE"))
local file = nil

function request()
  if file == nil then file = assert(io.open(path, "rb")) end
  local bytes = file:read(size)
  if bytes == nil or #bytes < size then os.exit(3) end
  return bytes
end

function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format("RESULT %d %d %d %d\n", summary.requests, summary.duration,
    errors.status, errors.connect + errors.read + errors.write + errors.timeout))
end
