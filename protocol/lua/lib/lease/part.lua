--- @include lib/basics/batch

local over = { leases = batch('ZREM'), held = batch('HDEL'), started = batch('ZREM'), records = batch('DEL'),
  shown = batch('SREM') }

-- As detach(), for requests of whose executions owns() says that they are current: written at the end, by
-- write_parted(). A script that stops before leaves them to the dead, from whom the next sweep takes them.
local function part(queue, id, execution, incarnation, worker)
  local composite = id .. ':' .. execution
  over.leases.add(KEY.leases .. queue, id)
  over.held.add(KEY.held .. incarnation, id)
  over.started.add(KEY.wip .. queue, composite)
  over.records.add(KEY.execution .. composite)
  over.records.add(KEY.executions .. id) -- a request has one at a time
  over.shown.add(KEY.worker .. worker .. ':executions', composite)
end

local function write_parted()
  for _, name in ipairs({ 'leases', 'held', 'started', 'records', 'shown' }) do over[name].send() end
end
