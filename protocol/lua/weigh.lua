-- Count the workers that live and are ready, for whoever decides whether the pool is degraded.
--
-- ARGV timeout_ms  heartbeat timeout
-- ARGV pulse_ms    the pulse is old after so many ms, or after three times the widest gap of late
--
-- Returns  now (ms), judged ('1'; '0' while nobody may be judged by heartbeats, as in reap.lua), how many live and are
--          ready, then field and value of each field of the mode as it was declared last (declare.lua)
--
-- Counted by scores, so that ten thousand workers cost as much as one: those whose heart beats, less those whose beats
-- say that they are not ready. (In this way round, a worker of a release that knows no such set counts too.)
-- The last call of a sweep: it is a pulse too, and says that the guardian which was asked to sweep has done so.

--- @include lib/basics/arguments
--- @include lib/basics/never_refused
--- @include lib/basics/numbers
--- @include lib/basics/time
--- @include lib/pool/pulse

never_refused()

local timeout_ms, pulse_ms = tonumber(arg()), tonumber(arg())

local stale = redis.call('ZRANGEBYSCORE', KEY.unready, '-inf', int(now_ms), 'LIMIT', 0, 128)
if #stale > 0 then redis.call('ZREM', KEY.unready, unpack(stale)) end

local judged, slack = pulse(timeout_ms, pulse_ms)
redis.call('HDEL', KEY.pulse, 'asked', 'asked_until')
local alive = '(' .. int(now_ms - slack)
local live = redis.call('ZCOUNT', KEY.beats, alive, '+inf') - redis.call('ZCOUNT', KEY.unready, alive, '+inf')
local reply = { int(now_ms), judged and '1' or '0', int(math.max(0, live)) }
for _, value in ipairs(redis.call('HGETALL', KEY.mode)) do reply[#reply + 1] = value end
return reply
