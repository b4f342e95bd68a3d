-- Store what running requests have put out, checkpoint them and renew their leases.
--
-- ARGV incarnation  of the worker process
-- ARGV lease_ms     length of the renewed leases, but for requests that have a step timeout of their own
-- ARGV clear_ms     a suspect that has stepped for so long is cleared
-- EACH kept: of_request  the request in whose checkpoint this field is to be, from 1
-- EACH kept: name        field of the checkpoint
-- EACH kept: value       what it holds
-- EACH request: id           request id
-- EACH request: execution    the caller's execution
-- EACH request: seq          number of this checkpoint, growing; the same when sent again
-- EACH request: offset       outputs that are stored before these
-- EACH request: outputs      how many outputs are in blob; 0 for none
-- EACH request: blob         one packed entry of the output log: (epoch, offset, outputs)
-- EACH request: has_state    '1' if state is to be stored
-- EACH request: state        packed state; '' if it was written in chunks
-- EACH request: crc          CRC-32 of the state, decimal
-- EACH request: chunks       how many chunks of this seq hold the state; 0 if it is in `state`
-- EACH request: length       bytes of the state
-- EACH request: stepped      ms for which this execution has stepped
-- EACH request: tell         '1' if whoever listens is to be told of the outputs
-- EACH request: brief        '1' if this execution has stored something before, and its claim has said of nothing that
--                            is to be watched: then only what may change is read, and `kept` stands there already
--
-- Returns  per request 'ok', 'heard' (the same, and somebody who listens was told), 'lost' (another execution holds
--          it, or none), 'cancel' (end it with `cancel`), 'deadline' (its deadline has passed: it was ended here, with
--          these outputs) or 'gap <n>' (n outputs are stored, fewer than offset: the caller must not go on) or
--          'missing' (not all of the state's chunks are there: nothing but the lease was stored, write them again)
--
-- A lease's end never refuses a write: expired but not reaped is still owned. A second sending is 'ok' and
-- changes nothing.

--- @include lib/basics/arguments
--- @include lib/basics/batch
--- @include lib/basics/numbers
--- @include lib/basics/time
--- @include lib/checkpoint/chunks
--- @include lib/checkpoint/hint
--- @include lib/checkpoint/history
--- @include lib/checkpoint/store
--- @include lib/ending/cancel_asked
--- @include lib/ending/end_running
--- @include lib/lease/lease
--- @include lib/lease/owns
--- @include lib/lease/refuse
--- @include lib/queue/ring
--- @include lib/rq/show_execution

local incarnation, lease_ms, clear_ms = arg(), tonumber(arg()), tonumber(arg())

-- Whether all chunks of a state are there, with so many bytes in all. Redis may have lost or evicted some.
local function chunks_there(id, execution, seq, chunks, length)
  local name, bytes = KEY.checkpoint .. id, 0
  if redis.call('HGET', name, 'writing') ~= table.concat({ execution, seq, chunks }, ':') then return false end
  for number = 1, tonumber(chunks) do bytes = bytes + redis.call('STRLEN', chunk_name(id, seq, number)) end
  return bytes == tonumber(length)
end

-- A suspect that has stepped for a while is none any more. With the last of them, its worker takes ordinary requests
-- again.
local function clear(id, queue, execution, incarnation, worker, offset)
  redis.call('HDEL', KEY.job .. id, 'company')
  history(id, 'cleared', worker, execution, offset, '', 'it has moved again')
  for _, other in ipairs(redis.call('HKEYS', KEY.held .. incarnation)) do
    if redis.call('HEXISTS', KEY.job .. other, 'company') == 1 then return end
  end
  redis.call('ZREM', KEY.isolating, incarnation)
  ring(queue)
end

local answers, leases, points = {}, batch('ZADD'), batch('ZADD')
local kept_of, none, new = {}, {}, {}
local lease_end = int(now_ms + lease_ms)
for _ = 1, tonumber(arg()) do
  local of_request, name, value = arg(), arg(), arg()
  local kept = kept_of[tonumber(of_request)] or {}
  kept_of[tonumber(of_request)] = kept
  kept[#kept + 1], kept[#kept + 2] = name, value
end
for place = 1, tonumber(arg()) do
  local id, execution, seq, offset, outputs = arg(), arg(), arg(), arg(), arg()
  local blob, has_state, state, crc, chunks, length = arg(), arg(), arg(), arg(), arg(), arg()
  local stepped, tell, brief = arg(), arg(), arg() == '1'
  local name = KEY.job .. id
  -- In a small hash Redis looks for each field from the first one on, and for one that is not there through all.
  local job = brief and redis.call('HMGET', name, 'execution', 'status', 'cancel', 'origin', 'started_at')
    or redis.call('HMGET', name, 'execution', 'status', 'cancel', 'origin', 'started_at', 'client', 'deadline',
      'step_ms', 'company', 'worker_name', 'claimed', 'counted_from')
  if not owns(id, execution, job[1], job[5]) then
    answers[#answers + 1] = refuse(id, execution, incarnation, job[4] or nil)
  elseif cancel_asked(job[3], job[2]) then
    leases.add(KEY.leases .. job[4], job[8] and int(now_ms + lease_length(job[8], lease_ms)) or lease_end, id)
    answers[#answers + 1] = 'cancel'
  else
    if job[2] ~= 'started' then redis.call('HSET', name, 'status', 'started') end
    leases.add(KEY.leases .. job[4], job[8] and int(now_ms + lease_length(job[8], lease_ms)) or lease_end, id)
    local point = has_state == '1'
      and redis.call('HMGET', KEY.checkpoint .. id, 'offset', 'seq', 'at', 'chunks', 'writing')
      or redis.call('HMGET', KEY.checkpoint .. id, 'offset', 'seq', 'at')
    if not brief then show_execution(id, execution, job[10] or '', job[11]) end
    point.claimed = job[11]
    local missing = chunks ~= '0' and tonumber(seq) > number_of(point[2])
      and not chunks_there(id, execution, seq, chunks, length)
    local stored, have = nil, 0
    if brief and not point[2] then
      missing = false -- somebody has deleted its checkpoint: there is nothing that this one could follow
    elseif not missing then
      new.seq, new.offset, new.outputs, new.blob = seq, offset, outputs, blob
      new.has_state, new.state, new.crc, new.chunks, new.length = has_state, state, crc, chunks, length
      new.stepped, new.kept = stepped, kept_of[place] or none
      stored, have = store(id, point, new, points)
    end
    if missing then
      answers[#answers + 1] = 'missing'
    elseif stored then
      if job[9] and tonumber(stepped) >= clear_ms then
        clear(id, job[4], execution, incarnation, job[10], int(stored))
      end
      -- On a channel of the request: Redis knows who listens to it. A producer of an earlier release listens to one for
      -- all of its requests.
      local heard = tell == '1' and tonumber(outputs) > 0
      if heard and hint(id .. ':outputs', id, int(stored)) == 0 then
        local client = brief and redis.call('HGET', name, 'client') or job[6] or ''
        heard = client ~= '' and hint(client .. ':outputs', id, int(stored)) > 0
      end
      if job[7] then
        -- An end takes back what is still to be written.
        leases.send()
        points.send()
      end
      local late = job[7] and end_running(job[4], id, execution, incarnation, job[7], job[12])
      answers[#answers + 1] = late and 'deadline' or heard and 'heard' or 'ok'
    else
      answers[#answers + 1] = 'gap ' .. int(have)
    end
  end
end
leases.send()
points.send()
return answers
